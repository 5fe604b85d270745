"""Runs the scripts of launch/examples on two ranks, and compares what they write with the live model."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from loraprune_ds.files import read_json
from tests.hf.results import is_slice, kept_indices, load, logits, masked, relative
from tests.hf.trainers import run_example
from tests.ranks import RankPool

SCRIPTS = {"sft.py": ("text",), "dpo.py": ("prompt", "chosen", "rejected"), "accelerate_loop.py": ("text",)}
STEPS = 5
# fp32: merging and the smaller sums round in another order than the live model. Rounding alone gives about 1e-6.
TOLERANCE = 1e-5
WORDS = "the cat sat on a mat while it rained and the dog ran home".split()
DS_CONFIG = "ds_configs/zero3.json"


def write_rows(path: Path, fields: tuple[str, ...]) -> Path:
    def sentence(i: int) -> str:
        return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))

    rows = ({field: sentence(3 * i + j) for j, field in enumerate(fields)} for i in range(16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trainer_options(out: Path) -> list[str]:
    options = {
        "output_dir": out,
        "ratio": 0.3,
        "prune_every": 2,
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


def check_example(ranks: RankPool, model: Path, folder: Path, script: str, *, timeout: float = 180) -> None:
    """Prunes in `folder`, and checks what was written there."""
    out, data = folder / "out", str(write_rows(folder / "rows.jsonl", SCRIPTS[script]))
    own_loop = script == "accelerate_loop.py"
    options = [str(out), DS_CONFIG] if own_loop else trainer_options(out)
    ids = torch.arange(3, 35)[None]
    live = ranks.run(2, run_example, script, [str(model), data, *options], ids, timeout=timeout)[0]
    check_results(model, out, ids, live, has_adapter=not own_loop)
    assert own_loop or list((out / "runs/pruning").iterdir())


def check_results(model: Path, out: Path, ids: Tensor, live: Tensor, *, has_adapter: bool) -> None:
    """Compares the folders `base`, `model` and the adapter in `out` with the dense model and the live logits."""
    dense, base, merged = load(model), load(out / "base"), load(out / "model")
    kept = kept_indices(out, dense)
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in dense.parameters())
    assert is_slice(base, dense, kept)
    assert relative(logits(merged, ids), live) < TOLERANCE
    assert relative(logits(masked(dense, merged, kept), ids), logits(merged, ids)) < TOLERANCE
    if has_adapter:
        assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(out / "base")
        adapted = PeftModel.from_pretrained(base, out).eval()
        assert relative(logits(adapted, ids), live) < TOLERANCE
        assert relative(logits(adapted.merge_and_unload(), ids), live) < TOLERANCE
