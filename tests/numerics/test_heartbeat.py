"""A rank that gives no sign is named on all ranks. One that is busy is waited for."""

import json
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed
from safetensors.torch import save_file

from loraprune_ds.config import DataSource, RunConfig
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.job import SILENCE, longest_silence
from loraprune_ds.train.data import loading
from loraprune_ds.train.data.sources import read_rows
from loraprune_ds.train.prepare import prepare
from loraprune_ds.train.watch import GRACE, INTERVAL, LOOKS, Heartbeat
from tests.support.ranks import RankPool
from tests.support.refusals import must_name, refused
from tests.support.resuming import config_for, write_run

SHORT = 1.0  # seconds


def fall_silent(silent: int) -> list[str | None]:
    """Rank `silent` stops to beat. The others look."""
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


def test_a_count_that_stands_still_is_found_and_one_late_look_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    comm: Any = SimpleNamespace(
        rank=0, gather_objects=lambda mine: [mine, mine], from_rank_0=lambda mine: mine
    )
    heartbeat = Heartbeat(comm, silence=1e6)
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


@pytest.mark.parametrize("given", ["0", "soon", "1e9", "nan"])
def test_a_silence_that_is_none_is_refused(given: str) -> None:
    must_name("LORAPRUNE_SILENCE", longest_silence, {"LORAPRUNE_SILENCE": given})
    assert longest_silence({}) == SILENCE
    assert longest_silence({"LORAPRUNE_SILENCE": "2.5"}) == 2.5


# Ranks wait for one that is busy longer than a collective may take

LIMIT, BUSY = 2.0, 5.0  # seconds


def work(comm: Communicator) -> str:
    try:
        comm.all_or_raise(lambda: time.sleep(BUSY) if comm.rank == 0 else None)
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
        assert hasty != "done"  # the limit works: without patience the run would have ended


def prepare_counting_reads(config: RunConfig, log: Path) -> None:
    """Prepares on two ranks of one node. Logs which rank reads the data."""
    comm = Communicator()

    def read(source: DataSource) -> Any:
        with log.open("a") as file:
            file.write(f"{comm.rank}\n")
        return read_rows(source)

    with patch.object(loading, "read_rows", read):
        prepare(config, comm)


def test_one_rank_of_a_node_makes_the_tokens_and_the_others_find_them(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = config_for(
        write_run(tmp_path), tmp_path / "out", f"data.held_out_fraction={0.2 + time.time() % 0.01}"
    )
    ranks.run(2, prepare_counting_reads, config, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "0\n"


def test_the_others_do_not_wait_for_tokens_that_cannot_be_made(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = config_for(write_run(tmp_path), tmp_path / "out", "data.format=instruction")
    errors = ranks.run(2, refused, prepare_counting_reads, config, tmp_path / "log")
    assert errors[0] == errors[1]
    assert "data.format" in errors[0]
    assert (tmp_path / "log").read_text() == "0\n"
