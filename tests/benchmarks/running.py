"""Starts scripts and runs on CPU ranks, and writes results."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.report import hardware, versions
from tests.support.launching import on_ranks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Shows a module's docstring as it is, and takes what DeepSpeed's launcher gives to a rank."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def cpu_environment(**more: str) -> dict[str, str]:
    return (
        os.environ
        | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        | more
    )


def run_base(ranks: int, settings: Iterable[str], *arguments: str, peer: str = "") -> None:
    """Runs base.yaml with other settings, or with another method's score (peer_run.py)."""
    script = ["tests/benchmarks/peer_run.py", "--peer", peer] if peer else ["launch/run.py"]
    changes = [word for setting in settings for word in ("--set", setting)]
    command = [
        *on_ranks(ranks),
        *script,
        "--config",
        "tests/benchmarks/base.yaml",
        *arguments,
        *changes,
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=cpu_environment())


def evaluated(model: str, *options: str) -> dict[str, Any]:
    """Returns the object that launch/evaluate.py prints."""
    command = [sys.executable, "launch/evaluate.py", model, *options, "--json"]
    answer = subprocess.run(
        command, cwd=ROOT, check=True, env=cpu_environment(), stdout=subprocess.PIPE, text=True
    )
    return json.loads(answer.stdout)


def origin(device: str = "cpu") -> dict[str, Any]:
    return {"versions": versions(), "hardware": hardware(device)}


def record(name: str, result: dict[str, Any], device: str = "cpu") -> None:
    """Writes results/{name}.json, with versions, commit and hardware."""
    write_json(RESULTS / f"{name}.json", result | origin(device))
    print(f"written: {RESULTS / name}.json", flush=True)


def add_to(path: Path, name: str, result: dict[str, Any]) -> None:
    """Adds a result to those of a file, in the place of an older one of the same name."""
    found = read_json(path) if path.exists() else {}
    write_json(path, found | {name: result | origin()})
