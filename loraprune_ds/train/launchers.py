"""Finds the launcher that started this process as a rank. It imports no torch, because it runs before the imports.

Any other parent may end before the run: the shell of `nohup ... &`, or a process outside of the container. A parent
counts by the program it runs. RANK proves nothing, because Kubeflow sets it for process 1 of a container.
"""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

import psutil

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
    """Returns the parent, if it is a launcher, and the `deepspeed` command above it, which no launcher watches."""
    found: list[int] = []
    process: psutil.Process | None = psutil.Process()
    with contextlib.suppress(psutil.Error):  # a process that has just ended
        for known in (LAUNCHERS, RUNNERS):
            process = process.parent()
            if process is None or program_of(process.cmdline()) not in known:
                break
            found.append(process.pid)
    return found


def is_alive(pid: int) -> bool:
    """Returns False for a process that has ended, also if its parent has not waited for it yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def program_of(words: Iterable[str]) -> str:
    """Names what a command line runs: the program, or the script or module that Python runs."""
    rest = iter(words)
    program = Path(next(rest, "").partition(":")[0]).name  # slurmstepd: [7001.0]
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
