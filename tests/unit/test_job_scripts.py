"""The scripts in slurm/ without a Slurm: what they have srun start, and whether they requeue themselves."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.launching import ROOT

SITE = """
PATH={bin}:$PATH
SRUN_OPTIONS=() RANKS_PER_NODE=2
: "${{MAX_RESTARTS:=3}}"
"""
SRUN = """#!/usr/bin/env bash
echo "${{*@Q}}" >>{started}
case $* in
  *launch/preflight.py*) ;;
  *--show*) echo {out} ;;
  *) {ranks} ;;
esac
"""
SCONTROL = """#!/usr/bin/env bash
case $* in
  "show hostnames "*) echo node1 ;;
  *"show job "*) echo "JobId=7 PreemptTime=None Restarts=0" ;;
  requeue*) touch {requeued}; kill -KILL $PPID ;; # as Slurm ends the shell
esac
"""


@dataclass(frozen=True)
class Ended:
    code: int
    log: str
    ranks: list[str]  # what was started on all ranks, word by word
    requeued: bool


def submit(folder: Path, script: str, *arguments: str, ranks: str = "true", **variables: str) -> Ended:
    """Runs a script with a `srun` and a `scontrol` that only pretend; `ranks` is what the ranks do, in bash."""
    bin, started, requeued = folder / "bin", folder / "started", folder / "requeued"
    bin.mkdir()
    (folder / "site.sh").write_text(SITE.format(bin=bin))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        filled = text.format(started=started, out=folder / "out", ranks=ranks, requeued=requeued)
        (bin / name).write_text(filled)
        (bin / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "node1"}
    site = {"LORAPRUNE_ROOT": str(ROOT), "LORAPRUNE_SITE": str(folder / "site.sh")}
    ended = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments],
        cwd=folder,
        env=os.environ | slurm | site | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    last = shlex.split(started.read_text().splitlines()[-1]) if started.exists() else []
    return Ended(ended.returncode, ended.stdout, last, requeued.exists())


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
