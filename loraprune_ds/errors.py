"""Exceptions that a user sees as one line, and how a command ends with them, without waiting for other ranks.

And fail-points, at which a test can kill a rank.
"""

import errno
import os
import sys
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

GRACE = 5.0  # seconds that the other ranks stay after an error
ONLY_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors that no read meets
OF_DISK = (*ONLY_WRITES, errno.EIO, errno.ESTALE)  # and those of a disk that fails
MAKE_ROOM = "free space or repair access, then start again, a run with --resume auto"
FAULT = os.environ.get("LORAPRUNE_FAULT")
_passed: Counter[str] = Counter()


class UserError(Exception):
    """Unusable input. The message names the key, file, layer or rank at fault."""

    exit_code = 2


class RunError(UserError):
    """A failure of a run that its user can act on, such as a NaN."""

    exit_code = 1


class ShortfallError(RunError):
    """A finished run that removed less than its last cut was to."""

    exit_code = 3


class RankError(RunError):
    """An error of one rank alone during a run. The other ranks wait, so this rank must report it."""


def is_shared(error: BaseException) -> bool:
    """Returns True if all ranks raise this error. Rank 0 alone then reports it."""
    return isinstance(error, UserError) and not isinstance(error, RankError)


def require(ok: object, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, or its type if it has none."""
    if isinstance(error, OSError) and error.strerror:  # str() would begin with "[Errno 2]"
        file = f"{error.filename}: " if error.filename else ""
        return file + error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def blame(error: OSError, message: str) -> UserError:
    """Returns a RunError with this message if a disk is full or fails. Otherwise input is at fault."""
    if error.errno in OF_DISK:
        return RunError(f"{message}; {MAKE_ROOM}")
    return UserError(message)


def failed_read(error: OSError) -> UserError:
    """Describes an error of an action that reads input. Libraries also write caches and temporary files."""
    if not error.strerror:  # from a library, which says what it did
        return UserError(one_line(error))
    verb = "written" if error.errno in ONLY_WRITES else "read"
    return blame(error, f"{error.filename or 'a file'} cannot be {verb}: {error.strerror}")


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message. The hub and `datasets` add advice to programmers."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def fail_point(phase: str) -> None:
    """Sends the signal of `LORAPRUNE_FAULT=phase@n:rank:signal` when that rank passes the phase for the n-th time.

    An example is `save.before_rename@2:0:9`. With `raise` in place of a signal it raises an error.
    """
    if FAULT is None:
        return
    _passed[phase] += 1
    place, rank, signal = FAULT.split(":")
    if place != f"{phase}@{_passed[phase]}" or rank != os.environ.get("RANK", "0"):
        return
    if signal == "raise":
        raise RuntimeError(f"fail-point {place}: raised")
    sys.stderr.write(f"fail-point {place}: signal {signal} to rank {rank}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), int(signal))


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
    where = "" if rank == "0" else f" on rank {rank}"
    sys.stderr.write(f"error{where}: {error}\n")
    sys.stderr.flush()


def run_command(work: Callable[[], int | None], *, agreed: bool = True) -> int:
    """Returns the exit code of `work`: 0 if it returns None, 2 for unusable input. `agreed` is as for `tell`."""
    try:
        return work() or 0
    except UserError as error:
        tell(error, agreed=agreed)
        return error.exit_code


def shorten_errors() -> None:
    """Makes a UserError that nobody catches end as one line, in a process of another tool."""
    others = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            tell(error)
        else:
            others(kind, error, trace)

    sys.excepthook = hook


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
