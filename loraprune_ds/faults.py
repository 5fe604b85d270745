"""Fail-points: places where a test can kill a rank.

`LORAPRUNE_FAULT=phase@n:rank:signal`, such as `save.before_rename@2:0:9`, sends the signal when that rank passes the
phase for the n-th time. With `raise` in place of a signal it raises an error.
"""

import os
import sys
from collections import Counter

FAULT = os.environ.get("LORAPRUNE_FAULT")
_passed: Counter[str] = Counter()


def fail_point(phase: str) -> None:
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
