"""Requests to stop or save, by files and signals. The end of a launcher is a request to stop, too.

The next step carries a request to all ranks.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

NOTHING, SAVE, STOP = 0, 1, 2
FILES = {STOP: "STOP", SAVE: "SAVE"}
# A parent is a launcher if it runs one of these programs. Other parents may end before the run: the shell of
# `nohup ... &`, or a process outside of the container. RANK proves nothing: Kubeflow sets it in containers.
LAUNCHERS = {
    "deepspeed.launcher.launch",
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "slurmstepd",  # starts the tasks of srun
}
# `loraprune-ds run` uses the last one
RUNNERS = {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"}


class RequestListener:
    """Keeps the request that this rank has received. A step uses the largest request of all ranks."""

    def __init__(self, folder: Path, *, watches_files: bool) -> None:
        self._folder = folder
        self._watches_files = watches_files
        self._signalled = False
        self._interrupted_at = 0.0
        numbers = [signal.SIGTERM, signal.SIGINT]
        has_launcher = not os.environ.keys().isdisjoint({"CROSS_RANK", "TORCHELASTIC_RUN_ID"})
        # Only if srun itself started this rank. A launcher in between would die of the signal, with its ranks.
        if "SLURM_PROCID" in os.environ and not has_launcher:
            numbers.append(signal.SIGUSR1)
        self._handlers_before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._on_signal) for number in numbers
        }

    def current(self) -> int:
        """Returns NOTHING, SAVE or STOP."""
        if self._signalled:
            return STOP
        if self._watches_files:
            for request, name in FILES.items():
                if (self._folder / name).exists():
                    return request
        return NOTHING

    def clear(self, honoured: int) -> None:
        """Removes the files of an honoured request: to stop also saves. A larger request stays for the next step."""
        for request, name in FILES.items():
            if self._watches_files and request <= honoured:
                (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Restores the earlier signal handlers."""
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number != signal.SIGINT:
            return  # Slurm and the launcher each deliver TERM, for one request
        now = time.monotonic()
        # A terminal and the launcher both deliver Ctrl-C. A user's second press comes later than the launcher's copy.
        if self._interrupted_at and now - self._interrupted_at > 1.0:
            raise KeyboardInterrupt
        self._interrupted_at = self._interrupted_at or now


def drop_stale_requests(folder: Path) -> list[str]:
    """Removes the files of requests to an earlier process. Returns a line about each. On rank 0 only."""
    stale = [folder / name for name in FILES.values() if (folder / name).exists()]
    for path in stale:
        path.unlink(missing_ok=True)
    return [f"{path} was there before this start: removed" for path in stale]


def find_launchers() -> list[int]:
    """Returns the parent, if it is a launcher, and the `deepspeed` command above it, which no launcher watches."""
    pids: list[int] = []
    with contextlib.suppress(psutil.Error):  # the process has just ended
        parents = psutil.Process().parents()
        for programs, process in zip((LAUNCHERS, RUNNERS), parents, strict=False):
            if program_of(process.cmdline()) not in programs:
                break
            pids.append(process.pid)
    return pids


def is_alive(pid: int) -> bool:
    """Returns False for a process that has ended, even if its parent has not waited for it."""
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
