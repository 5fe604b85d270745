"""Starts scripts and runs on CPU ranks, and writes results."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.report import hardware, versions
from tests.integration.launching import on_ranks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
WARMUP = 50  # steps


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Shows a module's docstring as it is, and takes what DeepSpeed's launcher gives to a rank."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def cpu_environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def run_base(ranks: int, settings: Iterable[str], *arguments: str, peer: str = "", **options: Any) -> None:
    """Runs base.yaml with other settings, or with another method's score (peer_run.py)."""
    script = ["tests/benchmarks/peer_run.py", "--peer", peer] if peer else ["launch/run.py"]
    changes = [word for setting in settings for word in ("--set", setting)]
    command = [*on_ranks(ranks), *script, "--config", "tests/benchmarks/base.yaml", *arguments, *changes]
    subprocess.run(command, check=True, cwd=ROOT, env=cpu_environment(), **options)


def evaluated(model: str, *options: str) -> dict[str, Any]:
    """Returns the object that launch/evaluate.py prints."""
    command = [sys.executable, "launch/evaluate.py", model, *options, "--json"]
    answer = subprocess.run(command, cwd=ROOT, check=True, env=cpu_environment(), stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout)


def train_for(seconds: float, model: Any, loss_of_step: Callable[[], Any], rate: float, decay: float) -> None:
    """Trains a dense model for seconds of CPU time, with a warm-up and a cosine. Prints the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=decay)
    start, step, part = time.process_time(), 0, 0.0
    while part < 1:
        factor = min(1, (step + 1) / WARMUP) * (0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2)
        optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, part = step + 1, (time.process_time() - start) / seconds
        if step % 50 == 0 or part >= 1:
            print(f"dense step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)


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
