"""Exceptions that a user sees as one line, without a traceback. And fail-points, at which a test can kill a rank."""

import os
import sys
from collections import Counter

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


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


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
    where, rank, how = FAULT.split(":")
    if where != f"{phase}@{_passed[phase]}" or rank != os.environ.get("RANK", "0"):
        return
    if how == "raise":
        raise RuntimeError(f"fail-point {where}: raised")
    sys.stderr.write(f"fail-point {where}: signal {how} to rank {rank}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), int(how))
