"""Requests from outside: a stop or save file and signals. They only set a flag, which the next step carries to all."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraprune_ds.zero.comm import Communicator

STOP_FILE = "STOP"
SAVE_FILE = "SAVE"

NOTHING, SAVE, STOP = 0, 1, 2
FILES = {STOP: (STOP_FILE, SAVE_FILE), SAVE: (SAVE_FILE,)}  # what a request has honoured once its checkpoint is there


class Requests:
    """What somebody asked this rank for; the step carries the largest request of all ranks to all ranks."""

    def __init__(self, folder: Path, *, watches_files: bool) -> None:
        self._folder = folder
        self._watches_files = watches_files
        self._signalled = False
        self._interrupted_at: float | None = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if _started_by_srun():
            numbers.append(signal.SIGUSR1)
        self._before: dict[signal.Signals, Any] = {n: signal.signal(n, self._on_signal) for n in numbers}

    def pending(self) -> int:
        """NOTHING, SAVE or STOP."""
        if self._signalled:
            return STOP
        if self._watches_files:
            if (self._folder / STOP_FILE).exists():
                return STOP
            if (self._folder / SAVE_FILE).exists():
                return SAVE
        return NOTHING

    def agree(self, comm: "Communicator") -> int:
        """The largest request of all ranks, for where no step carries it. Collective."""
        return max(comm.gather_objects(self.pending()))

    def clear(self, honoured: int) -> None:
        """Takes the files of an honoured request away; one that came during the save stays for the next step."""
        if self._watches_files:
            for name in FILES[honoured]:
                (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Signals do again what they did before: nothing asks for requests any more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number != signal.SIGINT:
            return  # Slurm and the launcher each deliver TERM: never more than one request
        now = time.monotonic()
        # A terminal and the launcher both deliver Ctrl-C; a second press comes later than their echo.
        if self._interrupted_at is not None and now - self._interrupted_at > 1.0:
            raise KeyboardInterrupt
        self._interrupted_at = self._interrupted_at or now


def drop_stale_requests(folder: Path) -> list[str]:
    """Removes requests that were meant for an earlier process: those there before this one started. On rank 0 only."""
    stale = [name for name in (STOP_FILE, SAVE_FILE) if (folder / name).exists()]
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    return [f"{folder / name} was there before this start: removed" for name in stale]


def _started_by_srun() -> bool:
    """A launcher in between dies of SIGUSR1 and takes its ranks with it, so they must not promise to save on it."""
    return "SLURM_PROCID" in os.environ and not {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
