"""What the commands in launch/ share: how they read arguments, tell an error and end."""

import argparse
import os
import sys
import time
import warnings
from types import TracebackType
from typing import NoReturn

from loraprune_ds.errors import UserError

GRACE = 5.0  # seconds that the other ranks stay after an error


class Parser(argparse.ArgumentParser):
    """Wrong arguments are told like any other wrong input: by one rank, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def tell(error: UserError, *, agreed: bool = True) -> None:
    """One line from rank 0 about what all ranks met.

    The first rank that leaves makes the launcher end the others, so those wait until rank 0 has spoken. A rank still
    alive after that met an error of its own, unless the ranks had `agreed` on it, and tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        _say(f"error: {error}")
        return
    time.sleep(GRACE)
    if not agreed:
        _say(f"error on rank {rank}: {error}")


def silence_libraries() -> None:
    """Leaves only what the command itself has to say. Before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)


def leave(code: int) -> NoReturn:
    """Ends this process without taking the interpreter down, which now and then aborts in a thread of gloo's (-6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """From now on an error that nobody expected ends this process right after its traceback.

    An interpreter that is taken down first can wait for other ranks, which wait for this one; the launcher, who ends
    them all, waits for its exit code.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        leave(1)

    sys.excepthook = hook


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
