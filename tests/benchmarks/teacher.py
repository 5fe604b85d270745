"""Compares a live teacher with a stored one: the quickstart's model, a quarter of distillation, one CPU rank.

    python -m tests.benchmarks.teacher [--steps 12]

Seconds are CPU seconds of the process, so that other work on the machine does not count. Peaks are RssAnon + RssShmem
within a step. State is what the plan says, which tests/numerics/test_plan_measured.py compares to the byte. The result
goes to results/teacher.json.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from torch.multiprocessing.spawn import spawn

from loraprune_ds.files import read_json, write_json
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.plan.request import make_request
from loraprune_ds.report.records import StepRecord
from loraprune_ds.train import loop
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.run import run
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from tests.benchmarks.memory import Peak
from tests.benchmarks.running import ROOT, make_parser, record
from tests.ranks import start_deepspeed

CONFIG = "launch/configs/quickstart.yaml"
SETTINGS = (
    "train.global_batch_size=4",
    "train.distill_weight=0.25",
    "train.distill_temperature=2",
    "prune.prune_every=2",
    "evaluate.max_windows=8",
)


def run_rank(rank: int, settings: list[str], folder: Path) -> None:
    """Makes a run in this process. Writes what its steps and its pass before them took."""
    start_deepspeed(rank, 1, folder)
    found: dict[str, Any] = {"losses": [], "seconds": [], "peak_bytes": [], "pass_before_seconds": 0.0, "disk_bytes": 0}
    make_step, record_teacher = Trainer.step, loop.record_teacher

    def step(trainer: Trainer, number: int) -> StepRecord:
        began = time.process_time()
        with Peak() as peak:
            made = make_step(trainer, number)
        for key, value in (("losses", made.loss), ("seconds", time.process_time() - began), ("peak_bytes", peak.peak)):
            found[key].append(value)
        return made

    def pass_before(*arguments: Any) -> bool:
        began = time.process_time()
        done = record_teacher(*arguments)
        found["pass_before_seconds"] = time.process_time() - began
        found["disk_bytes"] = sum(path.stat().st_size for path in (folder / "out" / "teacher").iterdir())
        return done

    request = make_request(None, Cluster(1, 1), config_path=CONFIG, overrides=settings)
    with mock.patch.object(Trainer, "step", step), mock.patch.object(loop, "record_teacher", pass_before):
        assert run(OutputFolder(request.config.to_dict(), None), Communicator())
    state = {stage.name: stage.state for stage in make_plan(request).stages}
    write_json(folder / "found.json", found | {"planned_state_bytes": state})


def measure(teacher: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="teacher-") as name:
        settings = [*SETTINGS, f"train.steps={steps}", f"train.teacher={teacher}", f"output_dir={name}/out"]
        spawn(run_rank, (settings, Path(name)), nprocs=1)
        found = read_json(Path(name) / "found.json")
    print(f"{teacher}: {mean(found['seconds']):.2f} s a step, {max(found['peak_bytes']) / 1e6:.0f} MB", flush=True)
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    result = {teacher: measure(teacher, arguments.steps) for teacher in ("stored", "live")}
    differences = (abs(a - b) for a, b in zip(*(found["losses"] for found in result.values()), strict=True))
    command = " ".join(["python -m tests.benchmarks.teacher", *sys.argv[1:]])
    record("teacher", result | {"command": command, "settings": SETTINGS, "largest_loss_difference": max(differences)})


if __name__ == "__main__":
    main()
