"""Ends a command with one-line errors and exit codes, without waiting for other ranks."""

import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from loraprune_ds.errors import UserError, is_shared

GRACE = 5.0  # seconds that the other ranks stay after an error


def tell(error: UserError, *, agreed: bool = True) -> None:
    """Prints an error in one line: on rank 0 for all ranks, or on the one rank that has it.

    The launcher ends all ranks when the first one exits, so other ranks wait until rank 0 has printed. A rank that is
    then still alive prints its error, unless the ranks `agreed` on it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE)
        if agreed and is_shared(error):
            return
    sys.stderr.write(f"error: {error}\n" if rank == "0" else f"error on rank {rank}: {error}\n")
    sys.stderr.flush()


def run_command(work: Callable[[], int | None]) -> int:
    """Returns the exit code of `work`: 0 if it returns None, 2 for unusable input."""
    try:
        return work() or 0
    except UserError as error:
        tell(error)
        return error.exit_code


def leave(code: int) -> NoReturn:
    """Ends this process immediately. A normal shutdown can abort in a thread of gloo (exit code -6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """Makes an unexpected error end this process right after its traceback."""
    # A normal shutdown can wait for other ranks, which wait for this one, while the launcher waits for the exit code.

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this hook with sys.stderr redirected to a buffer, which would be lost.
        text = "".join(traceback.format_exception(kind, error, trace))
        if os.environ.get("WORLD_SIZE", "1") != "1":
            text = textwrap.indent(text, f"[rank {os.environ.get('RANK', '0')}] ")
        try:
            os.write(2, text.encode(errors="backslashreplace"))
        finally:  # even if the reader of stderr is gone
            os._exit(1)

    sys.excepthook = hook
