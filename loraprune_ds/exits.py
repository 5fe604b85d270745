"""Ends a command: errors in one line, exit codes, and an end that waits for no other rank."""

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
    """Prints an error in one line: rank 0 for all ranks, or a rank that met it alone.

    The first rank that exits makes the launcher end the others, so those wait until rank 0 has printed. A rank that is
    still alive then prints its error, unless the ranks `agreed` on it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE)
        if agreed and is_shared(error):
            return
    sys.stderr.write(f"error: {error}\n" if rank == "0" else f"error on rank {rank}: {error}\n")
    sys.stderr.flush()


def run_command(work: Callable[[], int | None]) -> int:
    """Returns the exit code: `work`'s, or 0 without one, or 2 for unusable input."""
    try:
        return work() or 0
    except UserError as error:
        tell(error)
        return error.exit_code


def leave(code: int) -> NoReturn:
    """Ends this process immediately. An interpreter that shuts down can abort in a thread of gloo (exit code -6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """Makes an unexpected error end this process right after its traceback."""
    # While an interpreter shuts down it can wait for the other ranks, which wait for this one, while the launcher waits
    # for its exit code.

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this hook with sys.stderr pointing at a buffer, which would be lost here.
        text = "".join(traceback.format_exception(kind, error, trace))
        if os.environ.get("WORLD_SIZE", "1") != "1":
            text = textwrap.indent(text, f"[rank {os.environ.get('RANK', '0')}] ")
        try:
            os.write(2, text.encode(errors="backslashreplace"))
        finally:  # also if the reader of stderr is gone
            os._exit(1)

    sys.excepthook = hook
