"""Reads from /proc which processes above this one started it as a rank, and whether a process lives.

Any other parent may end before the run: the shell of `nohup ... &`, or a process outside of the container, which is
number 0. So a parent counts by what it runs. RANK proves nothing: Kubeflow sets it for process 1 of a container.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

LAUNCHERS = {
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "slurmstepd",  # starts what srun asks for
}
RUNNERS = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"}  # the last one by `loraprune-ds run`


def find_launchers() -> list[int]:
    """Returns the launcher of this process, if its parent is one, and the `deepspeed` command above it.

    DeepSpeed's launch.py does not watch that command.
    """
    launcher = os.getppid()
    if _program(launcher) not in LAUNCHERS:
        return []
    with contextlib.suppress(OSError):  # it has just ended
        above = int(_stat(launcher)[1])
        if _program(above) in RUNNERS:
            return [launcher, above]
    return [launcher]


def is_alive(pid: int) -> bool:
    """Tells if a process runs. One that has ended and was not waited for is gone."""
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def program_of(words: Iterable[str]) -> str:
    """Names what a command line runs: the program, or the script or module that Python runs."""
    rest = iter(words)
    program = Path(next(rest).partition(":")[0]).name  # slurmstepd: [7001.0]
    if not program.startswith("python"):
        return program
    for word in rest:
        if word in ("-X", "-W"):
            next(rest, None)
        elif re.fullmatch(r"-[A-Za-z]*m", word):
            return next(rest, "")
        elif not word.startswith("-"):
            return Path(word).name
    return ""


def _program(pid: int) -> str:
    """Returns "" for a process that is not to be seen. The kernel ends a container with its process 1."""
    try:
        return "" if pid <= 1 else program_of(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"))
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Reads /proc/PID/stat behind the program's name, which may hold anything: state, parent and more."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
