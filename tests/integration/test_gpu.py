"""Checks fp16 with its loss scale, end to end. Only a GPU can show it, so it is skipped without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launching import ROOT, free_port, write_config, write_text
from tests.oracle.models import make_tiny_llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    model = make_tiny_llama(
        tmp_path / "model", heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=96, layers=4, vocab=97, seed=1
    )
    config = write_config(
        tmp_path / "run.yaml",
        {
            "output_dir": str(tmp_path / "out"),
            "model": {"path": str(model), "dtype": dtype},
            "lora": {"r": 4},
            "data": {"path": str(write_text(tmp_path / "text.txt", 40_000)), "window": 32},
            "prune": {"channel_multiple": 1, "ratio": 0.3, "prune_every": 6},
            "train": {"steps": 30, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3},
            "evaluate": {"window": 32, "max_windows": 8},
        },
    )
    launcher = ["deepspeed", "--quiet", f"--master_port={free_port()}", "--num_gpus=1"]
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [*launcher, "launch/run.py", "--config", str(config)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert abs(1 - report["params"]["linear_pruned"] / report["params"]["linear_dense"] - 0.3) < 0.01
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if step["kind"] == "step" and not step["skipped"]]
    assert losses[-1] < losses[0]  # DeepSpeed's first scale is so high that it skips the first fp16 steps
