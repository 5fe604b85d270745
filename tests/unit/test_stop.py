"""Requests to stop set a flag. A rank whose launcher or peer is gone notices. A parent that is no launcher may end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.ranks.job import launcher_command
from loraprune_ds.train import stop
from tests.support.launching import ROOT, clean_environment, free_port


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[stop.RequestListener]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    requests = stop.RequestListener(tmp_path, watches_files=True)
    yield requests
    requests.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_stop_that_comes_while_a_save_is_honoured_is_not_lost(
    requests: stop.RequestListener, tmp_path: Path
) -> None:
    assert requests.current() == stop.NOTHING
    (tmp_path / "SAVE").touch()
    assert requests.current() == stop.SAVE
    (tmp_path / "STOP").touch()
    assert requests.current() == stop.STOP
    requests.clear(stop.SAVE)
    assert requests.current() == stop.STOP
    requests.clear(stop.STOP)
    assert list(tmp_path.iterdir()) == []


def test_only_one_rank_looks_at_files(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    other = stop.RequestListener(tmp_path, watches_files=False)
    assert other.current() == stop.NOTHING
    other.clear(stop.STOP)
    other.close()
    assert (tmp_path / "STOP").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_stop_and_its_echo_the_same_one(
    requests: stop.RequestListener, number: signal.Signals
) -> None:
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert requests.current() == stop.STOP


def test_only_a_second_interrupt_ends_it(
    requests: stop.RequestListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(stop.time, "monotonic", lambda: now)
    signal.raise_signal(signal.SIGINT)
    now = 100.9
    signal.raise_signal(signal.SIGINT)  # the launcher's copy of the first
    now = 101.1
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("variables", "catches"),
    [
        ({"SLURM_PROCID"}, True),
        ({"SLURM_PROCID", "CROSS_RANK"}, False),
        ({"SLURM_PROCID", "TORCHELASTIC_RUN_ID"}, False),
        (set(), False),
    ],
)
def test_usr1_is_caught_only_straight_under_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: set[str], catches: bool
) -> None:
    for name in ("SLURM_PROCID", "CROSS_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0") if name in variables else monkeypatch.delenv(
            name, raising=False
        )
    requests = stop.RequestListener(tmp_path, watches_files=False)
    assert (signal.getsignal(signal.SIGUSR1) == requests._on_signal) == catches
    requests.close()


# Launchers and other ranks that are gone

SCRIPT = """
import os, signal, sys, time
from loraprune_ds.train import watch
from loraprune_ds.train.stop import find_launchers

watch.INTERVAL, watch.GRACE = 0.05, 0.2

class Comm:
    rank, world_size = 1, 1
    def gather_objects(self, mine):
        return [(mine[0], int(sys.argv[1]) or mine[1]), mine]

signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
watcher = watch.Watch(Comm(), 80, find_launchers())
print(os.getpid(), os.getppid(), flush=True)
time.sleep(20)
"""
PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
GONE = "rank 1: the launcher is gone, so the run will stop\n"
UNSHARE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child",
]
# A shell that starts a rank, and ends when it has read a line.
SHELL = ["sh", "-c", '"$@" & read line', "sh"]


def start(above: Sequence[str | Path], other: int = 0) -> subprocess.Popen[str]:
    """A process with a Watch, whose other rank is process `other`. `above` is the command that starts it."""
    command = [*above, sys.executable, "-c", SCRIPT, str(other)]
    environment = clean_environment() | {"RANK": "0", "WORLD_SIZE": "1"}  # as Kubeflow does
    return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, env=environment, **PIPES)


def read_ids(process: subprocess.Popen[str]) -> tuple[int, int]:
    """Waits until the process watches. Returns its id and its parent's, as it sees them."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    assert words, process.communicate()[1]
    return int(words[0]), int(words[1])


def test_a_rank_leaves_when_another_of_its_node_is_gone() -> None:
    peer = subprocess.Popen(["sleep", "60"])
    process = start([], peer.pid)
    read_ids(process)
    time.sleep(0.3)
    assert process.poll() is None
    peer.kill()  # and not reaped: a zombie is gone too
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (1, "rank 1: rank 0 is gone: leaving\n")
    peer.wait()


def test_a_rank_whose_launcher_is_gone_takes_it_as_a_request_to_stop(tmp_path: Path) -> None:
    launcher = tmp_path / "torchrun"
    launcher.symlink_to("/bin/sh")
    process = start([launcher, *SHELL[1:]])
    assert read_ids(process)[1] == process.pid
    process.kill()
    out, err = process.communicate(timeout=10)  # at its end: the rank has left
    assert (out, err) == ("", GONE)


def test_a_shell_may_end_before_its_run() -> None:
    """Is `nohup python launch/run.py ... &`, then `exit`."""
    process = start(SHELL)
    rank, parent = read_ids(process)
    assert parent == process.pid
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    process.wait(timeout=10)
    time.sleep(0.5)
    os.kill(rank, signal.SIGKILL)  # an error if it has left
    assert process.communicate(timeout=10) == ("", "")


def test_a_parent_outside_of_the_container_is_no_launcher() -> None:
    """Is process 1 of a container, and what `docker exec` and `kubectl exec` start: the parent has number 0."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no pid namespace can be made here")
    process = start(UNSHARE)
    assert read_ids(process) == (1, 0)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    assert process.communicate(timeout=10) == ("", "")


@pytest.mark.parametrize(
    ("command", "program"),
    [
        (
            "python3.11 -u -m deepspeed.launcher.launch --world_info=e30= run.py",
            "deepspeed.launcher.launch",
        ),
        ("/env/bin/python /env/bin/deepspeed --quiet launch/run.py", "deepspeed"),
        ("/env/bin/python3 /env/bin/torchrun --nproc_per_node 2 launch/run.py", "torchrun"),
        (
            "python -X dev -W ignore -um torch.distributed.run launch/run.py",
            "torch.distributed.run",
        ),
        ("slurmstepd: [7001.0]", "slurmstepd"),
        ("bash train.sh torchrun", "bash"),
        ("python -c import+torchrun", "import+torchrun"),
        ("python", ""),
        ("", ""),
    ],
)
def test_a_process_counts_by_what_it_runs(command: str, program: str) -> None:
    assert stop.program_of(command.split(" ")) == program
    known = program not in ("bash", "import+torchrun", "")
    assert (program in stop.LAUNCHERS | stop.RUNNERS) == known


def test_real_launchers_are_found(tmp_path: Path) -> None:
    """Starts torchrun, and DeepSpeed's launcher as `loraprune-ds run` does."""
    module = tmp_path / "a_rank.py"
    module.write_text(
        "from loraprune_ds.train.stop import find_launchers\nprint(find_launchers())\n"
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--master_port={free_port()}",
        str(module),
    ]
    deepspeed = launcher_command("a_rank", 1, {})
    environment = clean_environment() | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    started = [
        subprocess.Popen(command, env=environment, **PIPES) for command in (torchrun, deepspeed)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    found = [re.search(r"^\[.*\]$", out, re.MULTILINE) for out, _ in ended]
    launchers = [
        json.loads(line[0]) if line else said for line, said in zip(found, ended, strict=True)
    ]
    assert launchers[0] == [started[0].pid]
    assert (launchers[1][1:], len(launchers[1])) == ([started[1].pid], 2)
