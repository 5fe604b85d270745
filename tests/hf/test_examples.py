"""The scripts of launch/examples on two ranks: what they write loads, and agrees with the live model."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loraprune_ds.files import read_json
from tests.hf.results import is_slice, kept_indices, load, logits, masked, relative
from tests.hf.trainers import run_example
from tests.oracle.models import make_tiny_llama
from tests.ranks import RankPool

STEPS = 5
# fp32: merging and the smaller sums round in another order than the live model. Rounding alone gives about 1e-6.
TOLERANCE = 1e-5
WORDS = "the cat sat on a mat while it rained and the dog ran home".split()
DS_CONFIG = "ds_configs/zero3.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    return make_tiny_llama(folder, heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=640, layers=4, vocab=97, seed=1)


def write_rows(path: Path, fields: tuple[str, ...]) -> Path:
    def sentence(i: int) -> str:
        return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))

    rows = ({field: sentence(3 * i + j) for j, field in enumerate(fields)} for i in range(64))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trainer_options(out: Path) -> list[str]:
    options = {
        "output_dir": out,
        "max_steps": STEPS,
        "deepspeed": DS_CONFIG,
        "use_cpu": "true",
        "bf16": "false",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_length": 32,
        "report_to": "tensorboard",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("script", "fields"),
    [("sft.py", ("text",)), ("dpo.py", ("prompt", "chosen", "rejected")), ("accelerate_loop.py", ("text",))],
)
def test_an_example_prunes_and_what_it_writes_agrees(
    ranks: RankPool, model: Path, tmp_path: Path, script: str, fields: tuple[str, ...]
) -> None:
    out, data = tmp_path / "out", str(write_rows(tmp_path / "rows.jsonl", fields))
    options = [str(out), str(STEPS), DS_CONFIG] if script == "accelerate_loop.py" else trainer_options(out)
    ids = torch.arange(3, 35)[None]
    live = ranks.run(2, run_example, script, [str(model), data, *options], ids)[0]

    dense, base, merged = load(model), load(out / "base"), load(out / "model")
    kept = kept_indices(out, dense)
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in dense.parameters())
    assert is_slice(base, dense, kept)
    assert relative(logits(merged, ids), live) < TOLERANCE
    assert relative(logits(masked(dense, merged, kept), ids), logits(merged, ids)) < TOLERANCE
    if script != "accelerate_loop.py":
        assert read_json(out / "adapter/adapter_config.json")["base_model_name_or_path"] == str(out / "base")
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()
        assert relative(logits(adapted, ids), live) < TOLERANCE
        assert relative(logits(adapted.merge_and_unload(), ids), live) < TOLERANCE
        assert list((out / "runs/pruning").iterdir())
