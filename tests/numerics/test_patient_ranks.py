"""Ranks that wait for one that is busy longer than a collective may take."""

import time
from datetime import timedelta
from typing import Any

import torch.distributed

from loraprune_ds.zero.comm import Communicator
from tests.ranks import RankPool

LIMIT, BUSY = 2.0, 5.0  # seconds


def work(comm: Communicator) -> str:
    try:
        comm.together(lambda: time.sleep(BUSY) if comm.rank == 0 else None)
    except (RuntimeError, torch.distributed.DistError) as error:
        return type(error).__name__
    return "done"


def wait_both_ways() -> tuple[str, str]:
    hasty: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=LIMIT))
    with Communicator(hasty).patient() as patient:
        waited = work(patient)
    return work(Communicator(hasty)), waited


def test_a_long_conversion_does_not_time_out(ranks: RankPool) -> None:
    for hasty, waited in ranks.run(2, wait_both_ways):
        assert waited == "done"
        assert hasty != "done"  # the limit is one: without patience the run would have ended
