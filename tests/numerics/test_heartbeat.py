"""A rank that gives no sign is named on all ranks, and one that is busy never is."""

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from loraprune_ds.errors import UserError
from loraprune_ds.train.watch import GRACE, INTERVAL, LOOKS, Heartbeat
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.environment import SILENCE, longest_silence
from tests.ranks import RankPool

SHORT = 1.0  # seconds


def fall_silent(silent: int) -> list[str | None]:
    """Rank `silent` stops to beat. The others look at what they hear of it."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    comm = Communicator()
    heartbeat = Heartbeat(comm, SHORT)
    comm.barrier()
    before = heartbeat.lost
    if comm.rank == silent:
        heartbeat.close()
    deadline = time.monotonic() + 20 * SHORT
    while heartbeat.lost is None and comm.rank != silent and time.monotonic() < deadline:
        time.sleep(SHORT / LOOKS)
    comm.barrier()
    heartbeat.close()
    heartbeat.join()
    return [heartbeat.problem, before, heartbeat.lost]


def test_all_ranks_hear_which_one_is_lost(ranks: RankPool) -> None:
    node = os.uname().nodename
    heard = ranks.run(3, fall_silent, 1)
    assert heard[0] == heard[2] == [None, None, f"rank 1 on {node}"]
    assert heard[1] == [None, None, None]


def be_busy(folder: Path) -> tuple[str | None, int]:
    """Rank 1 saves, reads data and computes for several silences, without a word to the others."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    comm = Communicator()
    heartbeat = Heartbeat(comm, SHORT)
    until = time.monotonic() + 3 * SHORT
    numbers = torch.ones(1 << 20)
    while comm.rank == 1 and time.monotonic() < until:
        save_file({"numbers": numbers}, folder / "numbers.safetensors")
        pickle.loads(pickle.dumps(json.loads(json.dumps([{"text": "word " * 20}] * 5_000))))
        (numbers.view(1024, 1024) @ numbers.view(1024, 1024)).sum().item()
        sum(number for number in range(300_000))
    comm.barrier()
    heartbeat.close()
    heartbeat.join()
    return heartbeat.lost, heartbeat.contacts


def test_a_busy_rank_is_not_lost(ranks: RankPool, tmp_path: Path) -> None:
    for lost, contacts in ranks.run(2, be_busy, tmp_path):
        assert lost is None
        assert contacts > LOOKS


class TwoRanks:
    rank = 0

    def gather_objects(self, mine: Any) -> list[Any]:
        return [mine, mine]


def test_a_count_that_stands_still_is_found_and_one_late_look_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    heartbeat = Heartbeat(cast(Any, TwoRanks()), silence=1e6)
    for look in range(LOOKS):
        assert heartbeat.look([look, 7]) is None  # the first look sees 7 for the first time
    assert heartbeat.look([99, 8]) is None
    for _ in range(LOOKS - 1):
        assert heartbeat.look([99, 8]) is None
    assert heartbeat.look([100, 8]) == f"rank 1 on {os.uname().nodename}"
    heartbeat.close()


def test_a_job_ends_within_two_minutes_of_a_loss() -> None:
    """Rank 0 looks for one look more than it needs, the others hear of it a beat later. Then comes the grace."""
    assert (LOOKS + 2) * SILENCE / LOOKS + INTERVAL + GRACE < 120


@pytest.mark.parametrize("given", ["", "0", "-5", "soon", "1e9", "nan"])
def test_a_silence_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"^LORAPRUNE_SILENCE must be seconds from 1 to 86400; got "):
        longest_silence({"LORAPRUNE_SILENCE": given})
    assert longest_silence({}) == SILENCE
    assert longest_silence({"LORAPRUNE_SILENCE": "2.5"}) == 2.5
