"""launch/examples/gkd.py: writing its own texts changes no bit of how a model is cut, next to being given them."""

import json
from pathlib import Path
from shutil import rmtree
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl.trainer.distillation_trainer import DistillationTrainer

from loraprune_ds.files import read_json
from loraprune_ds.report.records import read_history
from tests.oracle.models import make_tiny_llama
from tests.support.examples import OPTIONS, WORDS
from tests.support.ranks import RankPool
from tests.support.resuming import assert_equal_tensors
from tests.support.trainers import run_example

TOKENS = 8  # of each text
IDS = torch.arange(3, 35)[None]
SAVES = "--save_strategy steps --save_steps 2 --ratio 0.4 --head_ratio 0.5 --gradient_checkpointing true".split()
GREEDY = ["--generation_kwargs", json.dumps({"do_sample": False, "min_new_tokens": TOKENS})]
GREEDY += ["--max_completion_length", str(TOKENS)]
TUNED = "--train_sampling_strategy sequential --completion_only_loss true --warmup_steps 0.1 --output_dir".split()
Samples = list[dict[str, torch.Tensor]]  # of this rank, per micro-batch


def distil(argv: list[str], given: Samples | None = None) -> Samples:
    """Runs gkd.py on given samples, or on its own texts, which are those of the cut model. Returns the samples."""
    prepare, samples = DistillationTrainer._prepare_inputs, Samples()

    def take(trainer: Any, batch: Any) -> dict[str, torch.Tensor]:
        samples.append(prepare(trainer, batch) if given is None else given[len(samples)])
        new = samples[-1]
        if given is None:
            ids, mask = (
                torch.cat([new[f"prompt_{x}"], new[f"completion_{x}"]], dim=1)
                for x in ("ids", "mask")
            )
            with torch.no_grad():
                logits = trainer.model_wrapped(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(logits[:, -TOKENS - 1 : -1].argmax(-1), new["completion_ids"])
        return new

    with patch.object(DistillationTrainer, "_prepare_inputs", take):
        run_example("gkd.py", argv, IDS)
    return samples


def take_given(argv: list[str], samples: list[Samples]) -> None:
    distil(argv, samples[torch.distributed.get_rank()])


def write_prompts(path: Path, model: Path) -> Path:
    """Writes prompts of the same number of tokens, so no sample has padding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sentences = (" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 5)) for i in range(1, 200))
    fitting = [x for x in sentences if len(tokenizer(x)["input_ids"]) == 2 * TOKENS][:40]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in fitting))
    return path


def write_samples(path: Path, samples: list[Samples]) -> Path:
    """Writes them as rows for sft.py, in the order in which the ranks take turns."""
    taken = [new for of_ranks in zip(*samples, strict=True) for new in of_ranks]
    rows = [
        ids
        for new in taken
        for ids in torch.cat([new["prompt_ids"], new["completion_ids"]], dim=1).tolist()
    ]
    mask = [0] * 2 * TOKENS + [1] * TOKENS
    path.write_text(
        "".join(json.dumps({"input_ids": ids, "completion_mask": mask}) + "\n" for ids in rows)
    )
    return path


def course(out: Path) -> list[Any]:
    steps = read_history(out / "metrics.jsonl").steps
    return [(step.loss, step.grad_norm, step.tokens, step.sparsity) for step in steps]


def kept_at_first(out: Path) -> Any:
    return read_json(out / "checkpoint-2" / "pruning" / "state.json")["kept"]


def assert_same(out: Path, other: Path) -> None:
    assert course(out) == course(other)
    for path in (
        out / "adapter_model.safetensors",
        *out.glob("base/*.safetensors"),
        *out.glob("model/*.safetensors"),
    ):
        assert_equal_tensors(load_file(path), load_file(other / path.relative_to(out)))


@pytest.mark.heavy
def test_a_cut_between_two_rounds_of_generation_changes_no_bit(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Next to given samples in all steps, next to plain SFT on them in the first cut. Then it resumes across a cut."""
    model = make_tiny_llama(tmp_path / "model", heads=8, kv_heads=4, hidden=64, ffn=640, layers=4)
    own, given, tuned = (tmp_path / name for name in ("own", "given", "tuned"))
    prompts = write_prompts(tmp_path / "prompts.jsonl", model)
    argv = [str(model), str(prompts), *OPTIONS.split(), *SAVES, *GREEDY, "--output_dir"]
    samples = ranks.run(2, distil, [*argv, str(own)])
    ranks.run(2, take_given, [*argv, str(given)], samples)
    assert_same(own, given)
    rows = write_samples(tmp_path / "samples.jsonl", samples)
    ranks.run(
        2,
        run_example,
        "sft.py",
        [str(model), str(rows), *OPTIONS.split(), *SAVES, *TUNED, str(tuned)],
        IDS,
    )
    assert kept_at_first(tuned) == kept_at_first(own)
    for name in ("checkpoint-4", "checkpoint-5", "base", "model"):
        rmtree(own / name)
    ranks.run(2, run_example, "gkd.py", [*argv, str(own)], IDS)
    assert_same(own, given)
