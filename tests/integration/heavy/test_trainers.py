"""The callback in TRL's GRPOTrainer, and, on SmolLM2-135M, compared with our own trainer. Takes minutes."""

from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer

from loraprune_ds import LoraPruneCallback, PruneConfig, linear_names
from loraprune_ds.files import read_json
from loraprune_ds.model.embedded import embedded_model_dir, embedded_text
from tests.benchmarks.running import record
from tests.hf.results import check_results
from tests.hf.trainers import fresh_accelerate, train_alone, train_with_callback
from tests.integration.heavy.results import TAKES_MINUTES
from tests.numerics.driver import Job, write_adapter
from tests.oracle.models import make_lora, make_tiny_llama
from tests.ranks import RankPool

pytestmark = TAKES_MINUTES


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 17) for text in completions]


def train_grpo(model: str, out: Path, ids: torch.Tensor) -> torch.Tensor:
    """Tunes by rewards, with generation between the cuts. Returns the live model's logits."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    with fresh_accelerate():
        sizes: Any = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        sizes |= {"num_generations": 2, "max_completion_length": 8, "beta": 0.04}
        where: Any = {"output_dir": str(out), "use_cpu": True, "bf16": False, "disable_tqdm": True}
        deepspeed = read_json(Path("ds_configs/zero3.json"))
        args = GRPOConfig(**where, **sizes, deepspeed=deepspeed, report_to="none", save_strategy="no")
        callback = LoraPruneCallback(PruneConfig(ratio=0.3, prune_every=1, criterion="fisher"))
        trainer = GRPOTrainer(
            model=model,
            args=args,
            reward_funcs=cast(Any, reward),
            train_dataset=Dataset.from_dict({"prompt": ["the cat sat", "a dog ran home", "it rained", "a mat"] * 16}),
            peft_config=LoraConfig(r=8, target_modules=linear_names(model), task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        trainer.train()
        trainer.save_model()
        callback.save_base(out / "base", out)
        callback.save_model(out / "model")
        engine = cast(Any, trainer.model_wrapped)
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=ids).logits.float().clone()


def test_grpo(ranks: RankPool, tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "model", heads=8, kv_heads=4, hidden=64, ffn=640, layers=4)
    out, ids = tmp_path / "out", torch.arange(3, 35)[None]
    live = ranks.run(2, train_grpo, str(folder), out, ids)[0]
    check_results(folder, out, ids, live, has_adapter=True)


def batches(steps: int, samples: int, window: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    tokens = AutoTokenizer.from_pretrained(embedded_model_dir())("\n".join(embedded_text()))["input_ids"]
    ids = torch.tensor(tokens[: steps * samples * window]).view(steps, samples, window)
    return [(batch, batch.clone()) for batch in ids]


def test_smollm2_is_cut_as_by_our_own_trainer(ranks: RankPool, tmp_path: Path) -> None:
    """Our own trainer makes the same cuts, so a tie that falls otherwise does not part the two. It is written down."""
    folder = embedded_model_dir()
    adapter = write_adapter(tmp_path / "adapter", make_lora(folder, r=8, seed=2, size=0.03), r=8, alpha=16)
    # It cuts after the first three of four steps.
    prune = {"ratio": 0.3, "prune_every": 1, "cooldown_fraction": 0.3, "channel_multiple": 1}
    job = Job(
        folder, adapter, batches(4, 8, 64), prune, max_grad_norm=1.0, learning_rate=1e-3, adam_epsilon=1e-8,
        lora_r=8, lora_alpha=16,
    )  # fmt: skip
    foreign, _ = ranks.run(2, train_with_callback, job, tmp_path, {}, timeout=900)[0]
    own = ranks.run(2, train_alone, job, foreign, timeout=900)[0]
    rows = [
        {
            "step": step,
            "loss": {"callback": theirs["loss"], "own": ours["loss"]},
            "grad_norm": {"callback": theirs["norm"], "own": ours["norm"]},
            "groups_left": sum(len(groups) for layer in ours["kept"] for groups in layer),
            "chosen_otherwise": ours["differences"],
        }
        for step, (ours, theirs) in enumerate(zip(own, foreign, strict=True), start=1)
    ]
    record("trainer_callback", {"rows": rows})
    assert sum(after["kept"] != before["kept"] for before, after in pairwise([{"kept": None}, *own])) >= 3
    for step, (ours, theirs) in enumerate(zip(own, foreign, strict=True), start=1):
        # Adam's epsilon of 1e-8 turns rounding of near-zero gradients into full steps. Weights part slowly.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3), step
        for row in ours["differences"]:
            assert row["gap"] < 1e-3, row  # a tie, as far as such weights tell
