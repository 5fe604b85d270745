"""The scripts in slurm/ start the right commands and requeue themselves. Slurm itself is faked."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.checkpoint.layout import State, Status, write_status
from slurm import preflight
from tests.support.launching import ROOT, free_port, run_to_end

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


def submit(
    folder: Path,
    script: str,
    *arguments: str,
    ranks: str = "true",
    shown: str = RUNNING,
    **more: str,
) -> Ended:
    """Runs a script with a fake `srun`, whose ranks run the bash code `ranks`, and a `scontrol` that prints `shown`."""
    bin, started, requeued = folder / "bin", folder / "started", folder / "requeued"
    bin.mkdir()
    (folder / "site.sh").write_text(SITE.format(bin=bin))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        filled = text.format(
            started=started, out=folder / "out", ranks=ranks, requeued=requeued, shown=shown
        )
        (bin / name).write_text(filled)
        (bin / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "node1"}
    site = {"LORAPRUNE_ROOT": str(ROOT), "LORAPRUNE_SITE": str(folder / "site.sh")}
    command = ["bash", str(ROOT / "slurm" / script), *arguments]
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | slurm | site | more
    ended = subprocess.run(command, cwd=folder, env=environment, timeout=60, **streams)
    last = shlex.split(started.read_text().splitlines()[-1]) if started.exists() else []
    return Ended(
        ended.returncode,
        ended.stdout,
        last,
        requeued.read_text().strip() if requeued.exists() else None,
    )


@pytest.mark.parametrize(
    ("given", "sharded"),
    [
        (["--text", "x.txt"], True),
        (["--tasks", "piqa", "boolq"], False),
        (["--tasks=paper"], False),
    ],
)
def test_only_perplexity_is_measured_sharded(
    tmp_path: Path, given: list[str], sharded: bool
) -> None:
    ended = submit(tmp_path, "evaluate.sbatch", "model", *given)
    assert ended.code == 0, ended.log
    words = ended.ranks[ended.ranks.index(str(ROOT / "launch" / "evaluate.py")) + 1 :]
    assert words == ["model", *given, *(["--sharded"] if sharded else [])]


def status(step: int, state: State = "running", job: str | None = "7") -> Status:
    return Status(state, step, 10, job=job)


def fail_at(
    folder: Path, before: Status | None, after: Status, code: int = 1, **given: str
) -> Ended:
    """Runs prune.sbatch. The ranks find `before` in status.json, leave `after` and end with `code`."""
    if before is not None:
        write_status(folder / "out", before)
    write_status(folder / "after", after)
    ranks = f"mkdir -p {folder}/out; cp {folder}/after/status.json {folder}/out/; exit {code}"
    return submit(folder, "prune.sbatch", "config.yaml", ranks=ranks, **given)


def shown(old: str, new: str) -> dict[str, str]:
    return {"shown": RUNNING.replace(old, new)}


LAST = shown("Restarts=0", "Restarts=3") | {"SLURM_RESTART_COUNT": "3"}
# SLURM_JOB_ID may be the whole array's
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "35"}


@pytest.mark.parametrize(
    ("before", "after", "code", "given", "requeued"),
    [
        pytest.param(None, status(7), 137, {}, "7", id="killed"),
        pytest.param(status(6), status(7, "failed"), 1, {}, "7", id="further than before"),
        pytest.param(None, status(7), 1, ARRAY, "7_35", id="one task of an array"),
        pytest.param(status(6), status(7), 1, {"REQUEUE_FAILED": "0"}, None, id="switched off"),
        pytest.param(status(7), status(7), 1, {}, None, id="no further than before"),
        pytest.param(status(7), status(5), 1, {}, None, id="less far"),
        pytest.param(None, status(7), 2, {}, None, id="bad input"),
        pytest.param(None, status(7), 3, {}, None, id="below its ratio"),
        pytest.param(None, status(7, "stopped"), 85, {}, None, id="asked to stop"),
        pytest.param(None, status(7, job="8"), 1, {}, None, id="taken over by another job"),
        pytest.param(None, status(7, job=None), 1, {}, None, id="taken over outside Slurm"),
        pytest.param(None, status(7), 1, shown("RUNNING", "COMPLETING"), None, id="cancelled"),
        pytest.param(
            None, status(7), 1, shown("Time=None", "Time=2026-11-27"), None, id="preempted"
        ),
        pytest.param(
            None, status(7), 1, shown("Restarts=0", "Restarts=1"), None, id="on other nodes"
        ),
        pytest.param(None, status(7), 1, LAST, None, id="the last restart"),
    ],
)
def test_a_job_starts_again_after_new_steps_unless_it_would_fail_again_or_belongs_to_another(
    tmp_path: Path,
    before: Status | None,
    after: Status,
    code: int,
    given: dict[str, str],
    requeued: str | None,
) -> None:
    ended = fail_at(tmp_path, before, after, code, **given)
    assert ended.requeued == requeued, ended.log
    assert requeued or ended.code == code, ended.log


# The preflight: the nodes of a job agree if all are fit, and the first one names those that are not

NODES = ["localhost", "gpu2", "gpu3"]  # all meet at the first one


def fit() -> None:
    pass


def unfit() -> None:
    raise preflight.Unfit("2 accelerators\nfor 4 ranks")


@pytest.mark.parametrize(
    ("checks", "fits", "told"),
    [
        ([fit, fit, fit], [True] * 3, ""),
        ([fit, fit, unfit], [False] * 3, "preflight: gpu3: 2 accelerators for 4 ranks\n"),
        ([fit, None, fit], [False] * 2, "preflight: gpu2: no answer in 2 s\n"),
    ],
    ids=["all fit", "one unfit", "one absent"],
)
def test_a_bad_node_is_named_once_and_all_hear_of_it(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    checks: list[Callable[[], None] | None],
    fits: list[bool],
    told: str,
) -> None:
    """Each node is a thread."""
    monkeypatch.setattr(preflight, "VERDICT_READ_WITHIN", 1.0)
    port, timeout = free_port(), 20 if all(checks) else 2

    def be_node(index: int, check: Callable[[], None]) -> bool:
        return preflight.Rendezvous(NODES, index, port, timeout).agree("stage", check)

    with ThreadPoolExecutor(len(NODES)) as pool:
        nodes = [
            pool.submit(be_node, index, check)
            for index, check in enumerate(checks)
            if check is not None
        ]
        assert [node.result() for node in nodes] == fits
    # torch reports waits, too
    told_by_all = re.findall("^preflight: .*\n", capfd.readouterr().err, re.MULTILINE)
    assert "".join(told_by_all) == told


def test_a_folder_that_is_not_shared_or_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "VISIBLE_WITHIN", 0.0)
    with preflight.probe_file(tmp_path / "runs" / "mine") as file:
        assert file.parent == tmp_path
        preflight.check_visible(file, "gpu1")
    with pytest.raises(
        preflight.Unfit, match=r"output_dir is not shared: it has no .*, which gpu1 has written"
    ):
        preflight.check_visible(file, "gpu1")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), preflight.probe_file(tmp_path / "file" / "mine"):
        pass


def test_gloo_that_finds_no_way_to_the_others_is_told_its_variable(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "slurm/preflight.py",
        "--nodes",
        "localhost",
        "--port",
        str(free_port()),
    ]
    command += ["--output", str(tmp_path)]
    ended = run_to_end(command, cwd=ROOT, environment={"GLOO_SOCKET_IFNAME": "nosuch"}, timeout=120)
    assert ended.code == 1
    expected = "gloo does not reach the other nodes, GLOO_SOCKET_IFNAME must name a network interface that does: "
    assert f"preflight: localhost: {expected}" in ended.err
    assert "nosuch" in ended.err


def test_every_rank_takes_part_and_the_speed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of two ranks each. Each node is a thread, each rank a process."""
    port = free_port()

    def be_node(index: int) -> bool:
        rendezvous = preflight.Rendezvous(NODES[:1] * 2, index, port, 120)
        return rendezvous.agree("ranks", lambda: preflight.check_ranks(rendezvous, 2))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(be_node, range(2))) == [True, True]
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"preflight: all-to-all over 4 ranks by gloo: [\d.e-]+ GB/s to the slowest\n", out
    )
    assert err == ""


class FakeRanks:
    """Stands for torch.distributed on rank 0 of two. Rank 1 does what it should, except for `wrong`."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.ReduceOp = SimpleNamespace(MIN="min")

    def all_reduce(self, values: Tensor, op: str = "sum") -> None:
        if op == "sum":
            values += 5 if self.wrong == "sum" else 1
        else:
            assert op == "min"
            values.clamp_(max=2.0**-40)  # GB/s of rank 1: slower than any machine

    def all_to_all_single(self, received: Tensor, sent: Tensor) -> None:
        half = len(sent) // 2
        received[:half] = sent[:half]
        received[half:] = 7 if self.wrong == "part" else 1

    def barrier(self) -> None:
        pass


def test_every_gpu_that_a_rank_will_use_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    gpus = SimpleNamespace(
        device_count=lambda: 8, device_name=lambda index: used.append(index) or "cpu"
    )
    monkeypatch.setattr("loraprune_ds.zero.device.accelerator", lambda: gpus)
    monkeypatch.setattr("loraprune_ds.ranks.device.is_cpu", lambda: False)
    preflight.check_accelerators(4)
    assert used == [0, 1, 2, 3]
    with pytest.raises(preflight.Unfit, match=r"^8 accelerators for 9 ranks$"):
        preflight.check_accelerators(9)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: 1.5 * ones(*sizes))
    with pytest.raises(preflight.Unfit, match="cpu computes wrong numbers"):
        preflight.check_accelerators(1)
