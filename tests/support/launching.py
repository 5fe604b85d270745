"""Starts scripts as users do, by a launcher. Many short starts use ranks forked after the imports."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, TypeVar, cast

import yaml

from loraprune_ds.files import read_json
from tests.support.ranks import forking

ROOT = Path(__file__).parents[2]
RUN = ROOT / "launch" / "run.py"
T = TypeVar("T")
Launcher = Literal["deepspeed", "torchrun", "python"]


@dataclass(frozen=True)
class Ended:
    """Describes a process that has ended. Its code is minus the signal if a signal ended it."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def everything(self) -> str:
        return f"code {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def check(self) -> "Ended":
        """Fails, with the output, if the process did."""
        assert self.code == 0, self.everything
        return self


def write_text(path: Path, characters: int, *, start: int = 0) -> Path:
    """Prose: a part of Python's own help."""
    prose = "\n\n".join(topics[topic] for topic in sorted(topics))
    path.write_text(prose[start : start + characters], encoding="utf-8")
    return path


def write_config(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
    return path


def free_port() -> int:
    """Finds a port for `deepspeed --master_port`. Two runs would meet at the default one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(ranks: int, launcher: Launcher = "deepspeed", port: int | None = None) -> list[str]:
    """Returns the words of a command that start a script on some ranks of this machine."""
    port = port or free_port()
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))  # works without .venv activated
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master_port={port}",
    ]
    return {
        "deepspeed": [deepspeed, "--quiet", f"--num_accelerators={ranks}", f"--master_port={port}"],
        "torchrun": torchrun,
        "python": [sys.executable],
    }[launcher]


def launch(
    arguments: Sequence[str],
    *,
    launcher: Launcher = "deepspeed",
    ranks: int = 2,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Ended:
    """Runs launch/run.py with these arguments to its end, as `run_to_end` does."""
    command = [*on_ranks(ranks, launcher), str(RUN), *arguments]
    return run_to_end(command, cwd=cwd, environment=environment, timeout=timeout)


def run_to_end(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Ended:
    """Runs a command in its own session. Fails at the deadline, and kills all that it started."""
    began, process = time.monotonic(), start(command, cwd, environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"no end after {timeout:g} s\n--- stdout\n{out}\n--- stderr\n{err}"
        ) from None
    return Ended(process.returncode, out, err, time.monotonic() - began)


def start(
    command: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Starts a command in its own session."""
    pipes: Any = {
        "stdin": subprocess.DEVNULL,
        "stdout": stdout,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    environment = clean_environment() | dict(environment or {})
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)


def clean_environment() -> dict[str, str]:
    """Returns this process's environment without variables of a launcher or pytest. Imports come from this checkout."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in drop and not key.startswith("PYTEST_")
    }
    return kept | {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}


def fork_ranks(
    arguments: Sequence[str],
    folder: Path,
    *,
    script: Path = RUN,
    ranks: int = 1,
    cwd: Path = ROOT,
    environment: Callable[[int], dict[str, str]] = lambda rank: {},
    before: Callable[[], None] | None = None,
    timeout: float = 60,
) -> list[Ended]:
    """Runs a script on `ranks` ranks that end by themselves. A server that has the imports forks each in a second.

    Args:
        before: called first in every rank; a top-level function.
    """
    context = forking()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = []
    began = time.monotonic()
    for rank in range(ranks):
        of_rank = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        variables = clean_environment() | of_rank | environment(rank)
        outputs = [folder / f"{name}-{rank}" for name in ("stdout", "stderr")]
        given = ([str(script), *arguments], cwd, variables, outputs, before)
        process = context.Process(target=_be_rank, args=given, daemon=True)
        process.start()
        processes.append((process, outputs))
    ended = []
    for process, (out, err) in processes:
        process.join(max(0.1, began + timeout - time.monotonic()))
        ended.append(
            Ended(process.exitcode, out.read_text(), err.read_text(), time.monotonic() - began)
        )
    for process, _ in processes:
        process.kill()
    assert all(rank.code is not None for rank in ended), "\n".join(
        rank.everything for rank in ended
    )
    return ended


def _be_rank(
    command: list[str],
    cwd: Path,
    environment: dict[str, str],
    outputs: list[Path],
    before: Callable[[], None] | None,
) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))  # as an interpreter would
    if before is not None:
        before()
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception:
        # as an interpreter would; multiprocessing does not
        sys.excepthook(*cast(Any, sys.exc_info()))
        raise


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Returns the first true answer of a question that is asked again and again."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not in {seconds:g} s"
        time.sleep(0.02)
    return answer


def step_of(out: Path) -> int:
    """Returns the optimizer steps done, by status.json, or -1 before there is one."""
    path = out / "status.json"
    return read_json(path)["step"] if path.exists() else -1
