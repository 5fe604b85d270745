"""Fail-points: places where a test can kill a rank, so that a kill lands where it is meant to.

`LORAPRUNE_FAULT=phase@step:rank:signal`, e.g. `save.before_rename@12:0:9`. Nothing happens without the variable.
"""

import os
import sys

FAULT = os.environ.get("LORAPRUNE_FAULT")


def fail_point(phase: str, step: int) -> None:
    """Sends the signal to this very process if the variable names this phase, step and rank."""
    if FAULT is None:
        return
    where, rank, signal_number = FAULT.split(":")
    if where == f"{phase}@{step}" and rank == os.environ.get("RANK", "0"):
        sys.stderr.write(f"fail-point {where}: rank {rank} gets signal {signal_number}\n")
        sys.stderr.flush()
        os.kill(os.getpid(), int(signal_number))
