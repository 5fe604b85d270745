"""Fail-points: places where a test can kill a rank, so that a kill lands where it is meant to.

`LORAPRUNE_FAULT=phase@n:rank:signal` sends the signal when that rank passes the phase for the n-th time, for example
`save.before_rename@2:0:9`. Nothing happens without the variable.
"""

import os
import sys
from collections import Counter

FAULT = os.environ.get("LORAPRUNE_FAULT")
_passed: Counter[str] = Counter()


def fail_point(phase: str) -> None:
    """Sends the signal to this very process if the variable names this phase, pass and rank."""
    if FAULT is None:
        return
    _passed[phase] += 1
    where, rank, number = FAULT.split(":")
    if where == f"{phase}@{_passed[phase]}" and rank == os.environ.get("RANK", "0"):
        sys.stderr.write(f"fail-point {where}: signal {number} to rank {rank}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), int(number))
