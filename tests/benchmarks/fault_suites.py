"""The runs that faults.py strikes: how each starts, goes on, and says how far it came."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint import layout
from loraprune_ds.errors import UserError
from tests.benchmarks.fault_table import RANKS, STEPS, Job, run_to_end
from tests.benchmarks.running import ROOT, cpu_environment
from tests.support import callback_run
from tests.support.launching import on_ranks
from tests.support.resuming import write_run

EVERY, RECOVERY = 3, 4
PLAIN: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1},
    "prune": {"channel_multiple": 1, "prune_every": 3},
    "checkpoint": {"every": EVERY, "keep_last": 2},
    "evaluate": {"max_windows": 4},
}
LEVERS = PLAIN | {
    "train": {"steps": STEPS, "recovery_steps": RECOVERY, "distill_weight": 0.5}
    | {"global_batch_size": 16, "micro_batch_size": 4},
    "prune": {
        "channel_multiple": 1,
        "prune_every": 3,
        "criterion": "fisher",
        "compensate": "least_squares",
    },
}
_ports = itertools.count(random.Random(os.getpid()).randrange(20_000, 30_000))


def start(folder: Path, out: Path, command: Sequence[str], point: str | None = None) -> Job:
    """Starts a command on RANKS ranks by the real launcher, to be struck at a fail-point if one is given."""
    log, python = folder / "first.log", Path(sys.executable).parent
    launcher = on_ranks(RANKS, port=next(_ports))
    environment = cpu_environment(GLOO_SOCKET_IFNAME="lo", PATH=f"{python}:{os.environ['PATH']}")
    if point is not None:
        environment["LORAPRUNE_FAULT"] = point
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*launcher, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Job(out, log, process, folder)


@dataclass(frozen=True)
class Suite:
    """A run of launch/run.py in its own folder, its config, and its end without a fault."""

    folder: Path
    steps: int
    config: str
    expected: bytes

    def command(self, out: Path) -> list[str]:
        return [
            "launch/run.py",
            "--config",
            str(self.folder / "config.yaml"),
            "--set",
            f"output_dir={out}",
        ]

    def reached(self, job: Job) -> tuple[int, str | None]:
        """Returns the last step, and the state that the run says it is in."""
        return job.step(), json.loads((job.out / "status.json").read_text())["state"]

    def newest_good(self, out: Path) -> int | None:
        for step in reversed(layout.numbered(out / "checkpoints", "step")):
            folder = layout.step_folder(out / "checkpoints", step)
            try:
                layout.verify(folder)
                layout.verify(folder / layout.RESUME_FOLDER)
            except UserError:
                continue
            return step
        return None

    def resume(self, folder: Path, out: Path) -> None:
        run_to_end(folder, out, "--resume", "auto")


def make_suite(folder: Path, sections: dict[str, dict[str, Any]]) -> Suite:
    """Makes the undisturbed run."""
    straight = folder / "straight"
    straight.mkdir(parents=True)
    config = write_run(folder, **sections)
    run_to_end(straight, straight / "out")
    steps = STEPS + sections["train"].get("recovery_steps", 0)
    return Suite(folder, steps, config.read_text(), result_of(straight / "out"))


def result_of(out: Path) -> bytes:
    return (out / "kept_groups.json").read_bytes()


class CallbackSuite(Suite):
    """A training in transformers' Trainer. The same command starts it and goes on with it."""

    def command(self, out: Path) -> list[str]:
        return ["tests/support/callback_run.py", str(self.folder / "material"), str(out)]

    def reached(self, job: Job) -> tuple[int, str | None]:
        return layout.numbered(job.out, "checkpoint")[-1], None

    def newest_good(self, out: Path) -> int | None:
        steps = layout.numbered(out, "checkpoint")
        return next(
            (step for step in reversed(steps) if (out / f"checkpoint-{step}" / "pruning").is_dir()),
            None,
        )

    def resume(self, folder: Path, out: Path) -> None:
        job = start(folder, out, self.command(out))
        if job.process.wait() != 0:
            raise UserError(
                f"the resumed training ended with {job.process.returncode}: {job.text()[-300:]}"
            )


def make_callback_suite(folder: Path) -> Suite:
    straight = folder / "straight"
    straight.mkdir(parents=True)
    job = callback_run.make_job(folder / "material")
    (folder / "material" / "job").write_bytes(pickle.dumps(job))
    suite = CallbackSuite(folder, callback_run.STEPS, Path(callback_run.__file__).read_text(), b"")
    suite.resume(straight, straight / "out")
    expected = result_of(straight / "out")
    return CallbackSuite(folder, suite.steps, suite.config, expected)


SUITES: dict[str, Callable[[Path], Suite]] = {
    "plain": partial(make_suite, sections=PLAIN),
    "levers": partial(make_suite, sections=LEVERS),
    "callback": make_callback_suite,
}
