"""Requests from outside: a stop or save file, signals, a launcher that is gone. They only set a flag."""

import os
import signal
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"
SAVE_FILE = "SAVE"

NOTHING, SAVE, STOP = 0, 1, 2


class Requests:
    """What somebody asked this rank for; the step carries the largest request of all ranks to all ranks."""

    def __init__(self, folder: Path, *, watches_files: bool) -> None:
        self._folder = folder
        self._watches_files = watches_files
        self._signalled = False
        self._interrupted_at: float | None = None
        self._launcher = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if "SLURM_PROCID" in os.environ and "LAUNCHED_BY_DEEPSPEED" not in os.environ:
            signal.signal(signal.SIGUSR1, self._on_signal)

    def pending(self) -> int:
        """NOTHING, SAVE or STOP."""
        if self._signalled or os.getppid() != self._launcher:  # an orphan must not train on
            return STOP
        if self._watches_files:
            if (self._folder / STOP_FILE).exists():
                return STOP
            if (self._folder / SAVE_FILE).exists():
                return SAVE
        return NOTHING

    def clear(self) -> None:
        """Takes honoured requests back, so that a resumed run does not stop again."""
        if self._watches_files:
            for name in (STOP_FILE, SAVE_FILE):
                (self._folder / name).unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        # A terminal and the launcher both deliver Ctrl-C; a second press comes later than their echo.
        if self._interrupted_at is not None and now - self._interrupted_at > 1.0:
            raise KeyboardInterrupt
        self._interrupted_at = self._interrupted_at or now
