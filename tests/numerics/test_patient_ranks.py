"""Ranks that wait for one that is busy longer than a collective may take."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch.distributed

from loraprune_ds.config import RunConfig
from loraprune_ds.config_data import DataSource
from loraprune_ds.errors import UserError
from loraprune_ds.train.data import loading
from loraprune_ds.train.data.sources import read_rows
from loraprune_ds.train.prepare import prepare
from loraprune_ds.zero.comm import Communicator
from tests.integration.resuming import config_for, write_run
from tests.ranks import RankPool

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


def prepare_slowly(config: RunConfig, log: Path) -> None:
    """Prepares on two ranks of one node with a slow data set. Logs when it is asked for and when it has come."""
    comm = Communicator()

    def write(word: str) -> None:
        with log.open("a") as file:
            file.write(f"{word} {comm.rank}\n")

    def load_dataset(*_: Any, **__: Any) -> datasets.Dataset:
        write("asks")
        time.sleep(0.5)
        write("has")
        return datasets.Dataset.from_dict({"text": ["some words to train on " * 20] * 50})

    with patch("datasets.load_dataset", load_dataset):
        prepare(config, comm, is_first_on_node=comm.rank == 0)


def test_one_rank_of_a_node_asks_for_the_data_set_before_the_others(ranks: RankPool, tmp_path: Path) -> None:
    config = config_for(write_run(tmp_path), tmp_path / "out", "data.path=someone/data")
    ranks.run(2, prepare_slowly, config, tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[:2] == ["asks 0", "has 0"]


def prepare_counting_reads(config: RunConfig, log: Path) -> str:
    """Prepares on two ranks of one node. Logs which rank reads the data. Returns the error, if there is one."""
    comm = Communicator()

    def read(source: DataSource) -> Any:
        with log.open("a") as file:
            file.write(f"{comm.rank}\n")
        return read_rows(source)

    with patch.object(loading, "read_rows", read):
        try:
            prepare(config, comm, is_first_on_node=comm.rank == 0)
        except UserError as error:
            return str(error)
    return ""


def test_one_rank_of_a_node_makes_the_tokens_and_the_others_find_them(ranks: RankPool, tmp_path: Path) -> None:
    config = config_for(write_run(tmp_path), tmp_path / "out", f"data.held_out_fraction={0.2 + time.time() % 0.01}")
    assert ranks.run(2, prepare_counting_reads, config, tmp_path / "log") == ["", ""]
    assert (tmp_path / "log").read_text() == "0\n"


def test_the_others_do_not_wait_for_tokens_that_cannot_be_made(ranks: RankPool, tmp_path: Path) -> None:
    config = config_for(write_run(tmp_path), tmp_path / "out", "data.format=instruction")
    errors = ranks.run(2, prepare_counting_reads, config, tmp_path / "log")
    assert errors[0] == errors[1]
    assert "data.format instruction needs .json" in errors[0]
    assert (tmp_path / "log").read_text() == "0\n"
