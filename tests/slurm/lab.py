"""Holds the tools of the table of events: a cluster, a tiny run, and the same run without Slurm."""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraprune_ds.report import report
from tests.slurm.cluster import ROOT, Cluster, Job
from tests.support.launching import fork_ranks, read_json, within
from tests.support.resuming import write_run

PATIENCE = 900.0  # seconds; the machine may be busy with other things
RUN: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.0},
    "prune": {"channel_multiple": 1, "prune_every": 3},
    "train": {"steps": 10, "global_batch_size": 4},  # cuts after steps 4, 6, 9
    "checkpoint": {"every": 4, "keep_last": 2},
}


@dataclass
class Row:
    """Holds one line of the table. `state` and `restarts` are Slurm's words on the job at its end.

    `steps_lost` were done again. `same_groups`: kept_groups.json is the straight run's, byte for byte.
    """

    event: str
    expected: str = "COMPLETED"
    state: str = ""
    restarts: int = 0
    expected_restarts: tuple[int, ...] = (0,)
    same_groups: bool | None = None
    resumed_from: list[int] = field(default_factory=list)
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    problem: str | None = None
    commit: str | None = field(default_factory=lambda: report.commit(ROOT))  # when the event began

    @property
    def good(self) -> bool:
        as_expected = self.state == self.expected and self.restarts in self.expected_restarts
        return as_expected and self.problem is None and self.same_groups is not False


class Lab:
    """Runs `config` on a cluster, event after event. Each has its own output_dir."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.folder = cluster.folder
        self.config = write_run(self.folder, **RUN)
        self._straight: dict[tuple[int, tuple[str, ...]], Path] = {}

    def submit(self, out: str, *changes: str, options: Sequence[str] = (), **variables: str) -> Job:
        """Submits slurm/prune.sbatch with output_dir `out` and environment variables."""
        arguments = setting(f"output_dir={self.folder / out}", *changes)
        return self.cluster.submit(
            "prune.sbatch", self.config, *arguments, options=options, variables=variables
        )

    def straight(self, ranks: int, *changes: str) -> bytes:
        """kept_groups.json of the run without Slurm, on the same number of ranks."""
        return (self.straight_folder(ranks, *changes) / "kept_groups.json").read_bytes()

    def straight_folder(self, ranks: int, *changes: str) -> Path:
        if (ranks, changes) not in self._straight:
            out = self.folder / f"straight-{len(self._straight)}"
            arguments = ["--config", str(self.config), *setting(f"output_dir={out}", *changes)]
            fork_ranks(arguments, self.folder, ranks=ranks, timeout=PATIENCE)[0].check()
            self._straight[ranks, changes] = out
        return self._straight[ranks, changes]

    def finish(self, row: Row, job: Job, out: str, ranks: int = 2, *changes: str) -> None:
        """Waits for the end of the job and fills in the results."""
        row.state = job.wait_for_end(PATIENCE)
        row.restarts = job.restarts
        if row.state == "COMPLETED":
            self.compare(row, self.folder / out, ranks, *changes)
            row.resumed_from = read_json(self.folder / out / "report.json")["resumed_from"]
        elif row.state != row.expected:
            row.problem = job.log()[-2000:]

    def compare(self, row: Row, out: Path, ranks: int, *changes: str) -> None:
        row.same_groups = (out / "kept_groups.json").read_bytes() == self.straight(ranks, *changes)

    def rank_process(self, out: str, node: str) -> int:
        """Finds a rank of the run in `out` on a node, by its process id on this machine."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                host = f"SLURMD_NODENAME={node}".encode() in (
                    folder / "environ"
                ).read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                host
                and f"output_dir={self.folder / out}".encode() in words
                and b"--local_rank=0" in words
            ):
                return int(folder.name)
        raise AssertionError(f"no rank on {node}")

    def wait_until_idle(self, nodes: int) -> None:
        ask = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        within(120, lambda: self.cluster.execute(*ask).split().count("idle") == nodes)


def setting(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def said(log: str, *words: str) -> list[str]:
    """Returns the lines of a log that hold any of the words."""
    return [line[-200:] for line in log.splitlines() if any(word in line for word in words)]


Strike = Callable[[Lab, Row], None]
EVENTS: dict[str, tuple[Strike, dict[str, Any]]] = {}


def event(name: str, **expected: Any) -> Callable[[Strike], Strike]:
    """Adds an event to the table, with the fields of its row that say how it must end."""

    def add(strike: Strike) -> Strike:
        EVENTS[name] = (strike, expected)
        return strike

    return add


def carry_out(lab: Lab, name: str) -> Row:
    """Carries out an event. Its failure becomes the row's `problem`."""
    strike, expected = EVENTS[name]
    row = Row(name, **expected)
    began = time.monotonic()
    try:
        strike(lab, row)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        row.problem = str(error)[-3000:]
    row.seconds = round(time.monotonic() - began, 1)
    verdict = "ok  " if row.good else "FAIL"
    print(
        f"{verdict} {name:<60} {row.state:<10} {row.restarts:>2} {row.same_groups!s:<5} {row.seconds:>6}",
        flush=True,
    )
    if not row.good:
        print(row.problem, flush=True)
    return row
