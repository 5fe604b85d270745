"""Whole runs by their commands: every branch of the code for a GPU, fp16, and two ranks on one card."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json
from loraprune_ds.report.metrics import read_metrics
from loraprune_ds.zero.device import is_cpu
from tests.integration.launching import free_port, write_config, write_text
from tests.oracle.models import make_tiny_llama

ROOT = Path(__file__).parents[3]


def whole_run() -> dict[str, Any]:
    """Prunes a tiny LLaMA, stops in the middle and goes on: kept groups as without a stop, or nearly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _write_run(folder, dtype="bfloat16")
        _launch(config, "output_dir=" + str(folder / "straight"))
        (folder / "out").mkdir()
        stopped = _launch(config, "train.deterministic=true", stop_in=folder / "out")
        _launch(config, "train.deterministic=true", "--resume", "auto")
        _launch(config, "train.deterministic=true", f"output_dir={folder / 'again'}")
        report = read_json(folder / "straight" / "report.json")
        kept = [(folder / run / "kept_groups.json").read_bytes() for run in ("straight", "out", "again")]
    return {
        "rows": [
            {"what": "perplexity of the exported model", "measured": report["perplexity"]["pruned"]},
            {"what": "stopped on request (1: yes)", "planned": 1, "measured": int(stopped == 85)},
            {"what": "deterministic: same groups after a resume", "planned": 1, "measured": int(kept[1] == kept[2])},
            {"what": "not deterministic: the same groups", "measured": int(kept[0] == kept[2])},
        ],
        "report": {key: report[key] for key in ("perplexity", "seconds_per_step", "resident_bytes", "reserved_bytes")},
    }


def fp16() -> dict[str, Any]:
    """Trains in fp16. DeepSpeed's first loss scale is so high that steps are skipped."""
    if is_cpu():
        return {"skipped": "CPUs do not train in fp16"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _launch(_write_run(folder, dtype="float16"))
        lines = [line for line in read_metrics(folder / "out" / "metrics.jsonl") if line["kind"] == "step"]
    skipped = sum(line["skipped"] for line in lines)
    return {"rows": [{"what": "steps skipped, of 20", "measured": skipped}], "losses": [line["loss"] for line in lines]}


def two_ranks() -> dict[str, Any]:
    """Runs two ranks on one card, with gloo in NCCL's place: real gathers, side streams and all-to-alls."""
    common = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "tests.benchmarks.gpu_day.two_ranks"]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=common | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    ended = [rank.communicate(timeout=400) for rank in ranks]
    if any(rank.returncode for rank in ranks):
        return {"error": next(err for _, err in ended if err.strip())[-2000:]}
    return {"rows": [{"what": "loss after a cut", "measured": float(ended[0][0].split()[-1])}]}


def _write_run(folder: Path, *, dtype: str) -> Path:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 8, "hidden": 64, "ffn": 256}
    model = make_tiny_llama(folder / "model", layers=4, vocab=97, seed=1, **sizes)
    config = {
        "output_dir": str(folder / "out"),
        "deepspeed": "ds_configs/zero3_overlap.json",
        "model": {"path": str(model), "dtype": dtype},
        "data": {"path": str(write_text(folder / "text.txt", 20_000)), "window": 32},
        "prune": {"ratio": 0.3, "prune_every": 4},
        "train": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
        "evaluate": {"window": 32, "max_windows": 8},
        "logging": {"progress": False, "tensorboard": False, "profile_steps": [3]},
    }
    return write_config(folder / "run.yaml", config)


def _launch(config: Path, *changes: str, stop_in: Path | None = None) -> int:
    """Runs launch/run.py on one rank. Asks it to stop once it has begun, if `stop_in` is its folder.

    Raises:
        RuntimeError: it failed.
    """
    overrides = [word for change in changes if "=" in change for word in ("--set", change)]
    others = [change for change in changes if "=" not in change]
    command = [sys.executable, "launch/run.py", "--config", str(config), *overrides, *others]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while stop_in is not None and process.poll() is None and not (stop_in / "STOP").exists():
        if (stop_in / "status.json").exists() and read_json(stop_in / "status.json")["step"] >= 1:
            (stop_in / "STOP").touch()
        time.sleep(0.02)
    _, err = process.communicate()
    if process.returncode not in (0, 85):
        raise RuntimeError(err[-2000:])
    return process.returncode
