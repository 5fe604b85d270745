"""Fail-points: places where a test can kill a rank, so that a kill lands where the test wants it.

`LORAPRUNE_FAULT=phase@n:rank:signal` sends the signal when that rank passes the phase for the n-th time. An example
is `save.before_rename@2:0:9`. With `raise` in place of a signal an error is raised. Without the variable nothing
happens.
"""

import os
import sys
from collections import Counter

FAULT = os.environ.get("LORAPRUNE_FAULT")
_passed: Counter[str] = Counter()


def fail_point(phase: str) -> None:
    """Sends the signal to this process, or raises, if the variable names this phase, pass and rank."""
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
