"""Measures the capacities of oneDNN's and torch's caches of compiled kernels: memory and CPU seconds of a step.

    python -m tests.benchmarks.kernel_caches {different,equal} [--capacities 1024/1024 512/32 32/32]

The quickstart's model and settings, without a refit, make steps of one micro-batch in one process without DeepSpeed.
Each pair of capacities, oneDNN's/torch's, has its own process, on one thread. The processes make each step by turns.
`different` cuts each layer to its own width, `equal` all to the same.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from operator import truediv
from typing import Any
from unittest.mock import patch

from loraprune_ds.config_file import config_from_dict, read_config
from tests.benchmarks.running import RESULTS, ROOT, add_to, cpu_environment

# the first are the defaults
CAPACITIES = ("1024/1024", "1024/32", "512/32", "256/32", "128/32", "64/32", "32/32")
WIDTHS = {"different": "prune.ranking=global", "equal": "prune.ranking=uniform"}
# without warm-up. Cuts follow the steps 3 to 7
STEPS, BEFORE, AFTER = 11, slice(1, 3), slice(8, 11)
SETTINGS = (
    "deepspeed=null",
    f"train.steps={STEPS}",
    "train.global_batch_size=2",
    "prune.prune_every=1",
    "prune.warmup_fraction=0.2",
    "prune.cooldown_fraction=0.37",
    "prune.compensate=none",
)


def work(widths: str) -> None:
    """Makes a step, and its cut, for each line of the input. Prints what it took."""
    import torch

    from loraprune_ds.ranks.comm import Communicator
    from loraprune_ds.ranks.device import fast_half_products, resident_bytes
    from loraprune_ds.ranks.job import silence_libraries
    from loraprune_ds.report.records import History, Recorder
    from loraprune_ds.train.prepare import prepare
    from loraprune_ds.train.trainer import build_trainer

    silence_libraries()
    torch.set_num_threads(1)
    prepared = prepare(config_of(widths), Communicator())
    history = History()
    trainer = build_trainer(prepared, Recorder(history, []))
    print(flush=True)
    with fast_half_products(prepared.config.model.dtype):
        for _ in range(STEPS):
            sys.stdin.readline()
            began = time.process_time()
            with patch.object(trainer.pruning, "cut", lambda: None):
                trainer.train_step()
            seconds = time.process_time() - began
            record = history.steps[-1]
            cut = trainer.pruning.cut() is not None
            found = {
                "cpu_seconds": seconds,
                "peak_bytes": record.peak_bytes[0],
                "resident_bytes": resident_bytes(),
            }
            print(json.dumps(found | {"loss": record.loss, "cut": cut}), flush=True)


def config_of(widths: str) -> Any:
    return config_from_dict(
        read_config("launch/configs/quickstart.yaml", [*SETTINGS, WIDTHS[widths]])
    )


def start(widths: str, capacities: str) -> "subprocess.Popen[str]":
    """Starts the process of a pair of capacities. It prints a line once it has built its model."""
    onednn, torchs = capacities.split("/")
    environment = cpu_environment(ONEDNN_PRIMITIVE_CACHE_CAPACITY=onednn, LRU_CACHE_CAPACITY=torchs)
    command = [sys.executable, "-m", "tests.benchmarks.kernel_caches", widths, "--work"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe)


def next_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def step_of(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(next_line(process))


def summary(steps: list[dict[str, Any]], defaults: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the steps of a process, their medians before and after the cuts, and ratios in pairs of equal steps."""
    found: dict[str, Any] = {key: [step[key] for step in steps] for key in steps[0]}
    for when, some in (("before", BEFORE), ("after", AFTER)):
        seconds, others = ([step["cpu_seconds"] for step in x[some]] for x in (steps, defaults))
        found[when] = {
            "cpu_seconds": statistics.median(seconds),
            "over_defaults": statistics.median(map(truediv, seconds, others)),
            "peak_bytes": round(statistics.median(step["peak_bytes"] for step in steps[some])),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("widths", choices=WIDTHS)
    parser.add_argument(
        "--capacities", nargs="+", default=CAPACITIES, help="the first ones are compared with"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.widths)
        return
    processes = {
        capacities: start(arguments.widths, capacities) for capacities in arguments.capacities
    }
    for process in processes.values():
        next_line(process)
    steps: dict[str, list[dict[str, Any]]] = {capacities: [] for capacities in processes}
    for number in range(STEPS):
        for capacities, process in processes.items():
            steps[capacities].append(step_of(process))
        assert len({made[number]["loss"] for made in steps.values()}) == 1, (
            "a capacity changes a loss"
        )
    defaults = next(iter(steps.values()))
    found = {capacities: summary(made, defaults) for capacities, made in steps.items()}
    for capacities, row in found.items():
        print(capacities, *(f"{when} {row[when]}" for when in ("before", "after")), flush=True)
    result = {
        "capacities": found,
        "load_average": os.getloadavg()[0],
        "config": config_of(arguments.widths).to_dict(),
    }
    add_to(RESULTS / "kernel_caches.json", arguments.widths, result)


if __name__ == "__main__":
    main()
