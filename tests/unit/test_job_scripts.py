"""The scripts in slurm/ start the right commands and requeue themselves. Slurm itself is faked."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.checkpoint.layout import State, Status, write_status
from tests.integration.launching import ROOT

RUNNING = "JobState=RUNNING PreemptTime=None Restarts=0"
SITE = """
PATH={bin}:$PATH
SRUN_OPTIONS=() RANKS_PER_NODE=2
: "${{MAX_RESTARTS:=3}}" "${{REQUEUE_FAILED:=1}}"
"""
SRUN = """#!/usr/bin/env bash
echo "${{*@Q}}" >>{started}
case $* in
  *slurm/preflight.py*) ;;
  *--show*) echo {out} ;;
  *) {ranks} ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case $* in
  "show hostnames "*) echo node1 ;;
  *"show job "*) echo "JobId=7 {shown} StdOut=job.out" ;;
  requeue*) echo "$2" >{requeued}; kill -KILL $PPID ;; # as Slurm ends the shell
esac
"""


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    ranks: list[str]  # the words of the command that started on all ranks
    requeued: str | None  # as what


def submit(folder: Path, script: str, *arguments: str, ranks: str = "true", shown: str = RUNNING, **more: str) -> Ended:
    """Runs a script with a fake `srun`, whose ranks run the bash code `ranks`, and a `scontrol` that prints `shown`."""
    bin, started, requeued = folder / "bin", folder / "started", folder / "requeued"
    bin.mkdir()
    (folder / "site.sh").write_text(SITE.format(bin=bin))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        filled = text.format(started=started, out=folder / "out", ranks=ranks, requeued=requeued, shown=shown)
        (bin / name).write_text(filled)
        (bin / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "node1"}
    site = {"LORAPRUNE_ROOT": str(ROOT), "LORAPRUNE_SITE": str(folder / "site.sh")}
    command = ["bash", str(ROOT / "slurm" / script), *arguments]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | slurm | site | more
    ended = subprocess.run(command, cwd=folder, env=environment, timeout=60, **streams)
    last = shlex.split(started.read_text().splitlines()[-1]) if started.exists() else []
    return Ended(ended.returncode, ended.stdout, last, requeued.read_text().strip() if requeued.exists() else None)


@pytest.mark.parametrize(
    ("given", "sharded"),
    [
        (["--text", "x.txt"], True),
        (["--tasks", "piqa", "boolq"], False),
        (["--tasks=paper"], False),
        (["--text", "x.txt", "--speed"], False),
    ],
)
def test_only_perplexity_is_measured_sharded(tmp_path: Path, given: list[str], sharded: bool) -> None:
    ended = submit(tmp_path, "evaluate.sbatch", "model", *given)
    assert ended.code == 0, ended.log
    words = ended.ranks[ended.ranks.index(str(ROOT / "launch" / "evaluate.py")) + 1 :]
    assert words == ["model", *given, *(["--sharded"] if sharded else [])]


def status(step: int, state: State = "running", job: str | None = "7") -> Status:
    return Status(state, step, 10, job=job)


def fail_at(folder: Path, before: Status | None, after: Status, code: int = 1, **given: str) -> Ended:
    """Runs prune.sbatch. The ranks find `before` in status.json, leave `after` and end with `code`."""
    if before is not None:
        write_status(folder / "out", before)
    write_status(folder / "after", after)
    ranks = f"mkdir -p {folder}/out; cp {folder}/after/status.json {folder}/out/; exit {code}"
    return submit(folder, "prune.sbatch", "config.yaml", ranks=ranks, **given)


LAST = {"shown": RUNNING.replace("Restarts=0", "Restarts=3"), "SLURM_RESTART_COUNT": "3"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "35"}  # SLURM_JOB_ID may be the whole array's


@pytest.mark.parametrize(
    ("before", "state", "code", "given", "requeued"),
    [
        (None, "running", 137, {}, "7"),
        (status(6), "failed", 1, {}, "7"),
        pytest.param(None, "running", 1, ARRAY, "7_35", id="one task of an array"),
    ],
)
def test_a_job_whose_rank_failed_after_new_steps_starts_again(
    tmp_path: Path, before: Status | None, state: State, code: int, given: dict[str, str], requeued: str
) -> None:
    ended = fail_at(tmp_path, before, status(7, state), code, **given)
    assert ended.requeued == requeued, ended.log


@pytest.mark.parametrize(
    ("before", "after", "code", "given"),
    [
        pytest.param(status(6), status(7), 1, {"REQUEUE_FAILED": "0"}, id="switched off"),
        pytest.param(status(7), status(7), 1, {}, id="no further than before"),
        pytest.param(status(7), status(5), 1, {}, id="less far"),
        pytest.param(None, status(7), 2, {}, id="bad input"),
        pytest.param(None, status(7), 3, {}, id="below its ratio"),
        pytest.param(None, status(7, "stopped"), 85, {}, id="asked to stop"),
        pytest.param(None, status(7, job="8"), 1, {}, id="taken over by another job"),
        pytest.param(None, status(7, job=None), 1, {}, id="taken over outside Slurm"),
        pytest.param(None, status(7), 1, {"shown": RUNNING.replace("RUNNING", "COMPLETING")}, id="cancelled"),
        pytest.param(None, status(7), 1, {"shown": RUNNING.replace("Time=None", "Time=2026-11-27")}, id="preempted"),
        pytest.param(None, status(7), 1, {"shown": RUNNING.replace("Restarts=0", "Restarts=1")}, id="on other nodes"),
        pytest.param(None, status(7), 1, LAST, id="the last restart"),
    ],
)
def test_a_job_that_would_fail_again_or_belongs_to_another_does_not(
    tmp_path: Path, before: Status | None, after: Status, code: int, given: dict[str, str]
) -> None:
    ended = fail_at(tmp_path, before, after, code, **given)
    assert (ended.requeued, ended.code) == (None, code), ended.log
