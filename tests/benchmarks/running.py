"""Starts scripts on CPU ranks, and writes results."""

import os
import subprocess
from pathlib import Path
from typing import Any

from loraprune_ds.files import write_json
from loraprune_ds.report.provenance import hardware, versions
from tests.integration.launching import on_ranks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def cpu_environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def run_on_ranks(ranks: int, script: str, *arguments: str | Path, **options: Any) -> None:
    """Runs a script of the checkout by the deepspeed launcher to its end."""
    command = [*on_ranks(ranks), script, *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, env=cpu_environment(), **options)


def record(name: str, result: dict[str, Any], device: str = "cpu") -> None:
    """Writes results/{name}.json, with versions, commit and hardware."""
    write_json(RESULTS / f"{name}.json", result | {"versions": versions(), "hardware": hardware(device)})
    print(f"written: {RESULTS / name}.json", flush=True)
