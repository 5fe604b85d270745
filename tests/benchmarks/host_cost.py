"""Measures what a step and a cut cost the host: CPU seconds, on models so narrow that arithmetic hardly counts.

    git worktree add ../before 53542b2
    python -m tests.benchmarks.host_cost [--before ../before]

With `--before` another checkout is measured in the same run, by the same script (host_cost_rank.py). Plain DeepSpeed
and PEFT stand beside, without any pruning. So does the same network without ZeRO-3, as a limit. What is measured on two
CPU ranks, on the busier one:

* a step per decoder layer and micro-batch, forward and backward, as the difference of two depths
* the second step, in which DeepSpeed decides which weights to free, in plain steps
* a cut and the step after it, in plain steps
* the exchange of a cut with the shapes of LLaMA-65B on one of 8, 64 and 512 ranks, with copies and without. The other
  ranks are simulated

All of it is measured in some rounds by turns, and the least CPU seconds count. The result goes to
tests/benchmarks/results/host_cost.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.provenance import hardware, versions
from tests.benchmarks.growth import WIDTHS
from tests.integration.launching import free_port
from tests.oracle.models import make_tiny_llama

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "host_cost.json"
RANKS, DEPTHS = 2, (6, 18)


def measure(checkout: Path, models: list[Path], folder: Path, run: str) -> dict[str, Any]:
    """Returns what `host_cost_rank.py` measures on the packages of `checkout`."""
    result = folder / f"{checkout.name}-{run}.json"
    command = [Path(sys.executable).with_name("deepspeed"), "--quiet", f"--master_port={free_port()}"]
    command += [f"--num_accelerators={RANKS}", Path(__file__).with_name("host_cost_rank.py"), "--result", result]
    command += ["--models", *models, "--run", run]
    environment = os.environ | {"PYTHONPATH": str(checkout), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, cwd=checkout, env=environment)
    return read_json(result)


def least(rounds: list[Any]) -> Any:
    """Returns the least of each number over the rounds. What else the machine does can only add to it."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: least([found[key] for found in rounds]) for key in first}
    if isinstance(first, list):
        return [least(list(of_depth)) for of_depth in zip(*rounds, strict=True)]
    return min(rounds)


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Returns CPU seconds, and the parts of a run in plain steps of the deeper model."""
    shallow, deep = found["depths"]
    row = {
        "per_layer_and_micro_batch": (deep["plain"] - shallow["plain"]) / (DEPTHS[1] - DEPTHS[0]),
        "plain_step": deep["plain"],
        "second_step": deep["second"],
        "second_over_plain": deep["second"] / deep["plain"],
    }
    if "cut" in deep:
        row |= {key: deep[key] for key in ("scored", "cut", "after_the_cut", "small")}
        row["cut_and_step_after_over_plain"] = (deep["cut"] + deep["after_the_cut"] - deep["small"]) / deep["plain"]
        row |= {f"{key}_of_65b": value for key, value in found.items() if key.startswith("exchange")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, default=RESULT, help="default: tests/benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [make_tiny_llama(folder / str(depth), layers=depth, seed=depth, **WIDTHS) for depth in DEPTHS]
        runs = {"plain DeepSpeed and PEFT": (ROOT, "plain"), "without ZeRO-3": (ROOT, "alone")}
        if arguments.before:
            runs["before"] = (arguments.before.resolve(), "pruning")
        runs["after"] = (ROOT, "pruning")
        rounds = [
            {name: measure(checkout, models, folder, run) for name, (checkout, run) in runs.items()}
            for _ in range(arguments.rounds)
        ]
    rows = {name: summarise(found) for name, found in least(rounds).items()}
    facts = {
        "ranks": RANKS,
        "rounds": arguments.rounds,
        "depths": DEPTHS,
        "widths": WIDTHS,
        "hardware": hardware("cpu"),
        "versions": versions(),
    }
    write_json(arguments.result, {"rows": rows} | facts)
    for name, row in rows.items():
        print(name)
        for key, value in row.items():
            print(f"  {key:<32}{value if isinstance(value, dict) else format(value, '.4f')}")


if __name__ == "__main__":
    main()
