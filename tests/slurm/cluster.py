"""Runs a real Slurm on this machine (cluster.sh), and its jobs, for the tests and the table of events."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.launching import ROOT, clean_environment, step_of

SCRIPT = Path(__file__).parent / "cluster.sh"
SHIPPED = ROOT / "slurm"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
FOR_GOOD = 3.0  # seconds; a job that is requeued is in an end state for a moment


def obstacle() -> str:
    """Tells why no cluster can run here. Empty if one can."""
    return subprocess.run(
        [SCRIPT, "obstacle"], capture_output=True, text=True, check=True
    ).stdout.strip()


class Cluster:
    """Runs commands on the login node, in `folder`, where the jobs leave their logs."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment

    def execute(
        self,
        *command: str | Path,
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 300,
    ) -> str:
        """The output of a command on the login node, which must succeed."""
        where: Any = {"cwd": cwd or self.folder, "env": self.environment | (variables or {})}
        streams: Any = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        ended = subprocess.run([SCRIPT, "exec", *command], **where, **streams, timeout=timeout)
        assert ended.returncode == 0, (
            f"{command}: code {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        )
        return ended.stdout + ended.stderr

    def submit(
        self,
        script: str,
        *arguments: str | Path,
        options: Sequence[str] = (),
        variables: dict[str, str] | None = None,
    ) -> "Job":
        """One of the shipped scripts, by its name in slurm/."""
        answer = self.execute(
            "sbatch", "--parsable", *options, SHIPPED / script, *arguments, variables=variables
        )
        return Job(self, answer.strip())

    def cut(self, node: int) -> None:
        """Unplugs the network of a node."""
        subprocess.run([SCRIPT, "cut", str(node)], env=self.environment, check=True)

    def join(self, node: int) -> None:
        subprocess.run([SCRIPT, "join", str(node)], env=self.environment, check=True)


@dataclass(frozen=True)
class Job:
    """Describes a job. `number` names a job, or an array and its task (5_20)."""

    cluster: Cluster
    number: str

    def field(self, name: str) -> str:
        """One field of `scontrol show job`."""
        shown = self.cluster.execute("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"(?:^| ){name}=(\S+)", shown)
        assert found is not None, shown
        return found.group(1)

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def log(self) -> str:
        path = Path(self.field("StdOut"))
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, (
                f"job {self.number}: not {what} in {timeout:g} s\n{self.log()}"
            )
            time.sleep(0.3)

    def wait_for_end(self, timeout: float) -> str:
        """The state it has ended in for good."""
        while True:
            self.wait_until(lambda: self.state in ENDED, "ended", timeout)
            time.sleep(FOR_GOOD)
            if (state := self.state) in ENDED:
                return state

    def wait_for_step(self, out: Path, step: int, timeout: float) -> None:
        """Until the run in `out` has done `step` optimizer steps."""
        self.wait_until(lambda: step_of(out) >= step, f"at step {step}", timeout)


@contextmanager
def running_cluster(folder: Path, *, nodes: int = 2, ranks_per_node: int = 1) -> Iterator[Cluster]:
    """Runs a cluster whose jobs use CPUs, set up by the shipped slurm/site.sh. Removes it afterwards."""
    environment = clean_environment() | {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}:/usr/sbin:/sbin",
        "CLUSTER_DIR": str(folder / "cluster"),
        "NODES": str(nodes),
        "LORAPRUNE_ROOT": str(ROOT),
        "NODE_CACHE": str(folder / "cache"),
        "RANKS_PER_NODE": str(ranks_per_node),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    del environment["GLOO_SOCKET_IFNAME"]  # names resolve as they do on a cluster
    subprocess.run([SCRIPT, "start"], env=environment, check=True, timeout=300)
    try:
        yield Cluster(folder, environment)
    finally:
        subprocess.run([SCRIPT, "stop"], env=environment, check=True, timeout=60)
