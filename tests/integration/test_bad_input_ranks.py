"""Checks input that one rank lacks, that only a step shows, or that a launcher could hide. All end, rank 0 tells."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.bad_input import STEPS, arguments, assert_refused, copy_of_model
from tests.support.families import heavy
from tests.support.launching import ROOT, fork_ranks, launch, read_json, write_config, write_text
from tests.support.ranks import RENAMED
from tests.support.refusals import edit_tensors


@pytest.fixture
def homes(material: Path, tmp_path: Path) -> Callable[[int], dict[str, str]]:
    """Makes a home folder per rank, as on two machines. Rank 0's holds text.txt and model/, rank 1's nothing."""
    for rank in range(2):
        (tmp_path / f"home{rank}").mkdir()
    shutil.copy(material / "text.txt", tmp_path / "home0")
    shutil.copytree(material / "model", tmp_path / "home0" / "model")
    return lambda rank: {"HOME": str(tmp_path / f"home{rank}")}


def wait_a_second() -> None:
    from loraprune_ds.train import output

    output.SHARED_WAIT = 1.0


@pytest.mark.parametrize(
    ("setting", "name", "told"),
    [
        ("data.path", "text.txt", "~/text.txt"),
        heavy("model.path", "model", "~/model"),
        ("data.path", "other.txt", "rank 0"),
        ("output_dir", "out", "home1/out"),
    ],
)
def test_what_only_one_rank_lacks_or_has_is_told_of_it(
    setting: str,
    name: str,
    told: str,
    homes: Callable[[int], dict[str, str]],
    material: Path,
    tmp_path: Path,
) -> None:
    for rank in range(2):
        write_text(tmp_path / f"home{rank}" / "other.txt", 6_000, start=rank)
    given = arguments(material, tmp_path, f"{setting}=~/{name}")
    first, other = fork_ranks(given, tmp_path, ranks=2, environment=homes, before=wait_a_second)
    assert_refused(first, "rank 1", told, setting if name != "other.txt" else "")
    assert (other.code, other.err) == (2, "")
    assert not list(tmp_path.rglob("status.json"))


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


def test_a_nan_ends_the_run_on_all_ranks_and_is_told(material: Path, tmp_path: Path) -> None:
    """Checks the one wrong input that only a step can show. The folder tells it, and so does the next start."""
    copy_of_model(edit_tensors(poison))(material, tmp_path)
    given = arguments(material, tmp_path, f"model.path={tmp_path / 'model'}")
    first, other = fork_ranks(given, tmp_path, ranks=2)
    told = first.err.splitlines()[-1]  # after the lines of progress
    assert all(name in told for name in ("error: step 1", "nan", "rank 0", "layer 1"))
    assert (first.code, other.code, other.err) == (1, 1, "")
    status = read_json(tmp_path / "out" / "status.json")
    assert (status["state"], status["step"], f"error: {status['error']}") == ("failed", 0, told)
    assert not (tmp_path / "out" / "model").exists()
    (again,) = fork_ranks(given, tmp_path)
    assert_refused(again, f"output_dir {tmp_path / 'out'}", f"step 0 of {STEPS}")


def read_fault() -> None:
    """Reads the variable again, which the server that forks the ranks did not have."""
    from loraprune_ds import errors

    errors.FAULT = os.environ["LORAPRUNE_FAULT"]


def run_out_of_memory() -> None:
    """Runs out of memory at the first step. Leaving the process group then waits, as NCCL does for other ranks."""
    from loraprune_ds.train.trainer import Trainer

    mock.patch.object(
        Trainer, "train_step", side_effect=torch.OutOfMemoryError("of the device")
    ).start()

    def leave(group: object = None) -> None:
        if group is None:  # not one of a few ranks or for one purpose
            time.sleep(1000)

    mock.patch("torch.distributed.destroy_process_group", side_effect=leave).start()


def test_an_error_nobody_expected_ends_its_rank_without_waiting_for_others(
    material: Path, tmp_path: Path
) -> None:
    (ended,) = fork_ranks(arguments(material, tmp_path), tmp_path, before=run_out_of_memory)
    assert ended.code == 1, ended.everything
    assert "OutOfMemoryError: of the device" in ended.err
    assert (
        read_json(tmp_path / "out" / "status.json")["error"]
        == "torch.OutOfMemoryError: of the device"
    )


def test_the_first_failing_rank_tells_its_error(material: Path, tmp_path: Path) -> None:
    """Checks an unexpected error of rank 1. All that rank 0 sees of it is a broken connection."""
    given = arguments(material, tmp_path)
    fault = {"LORAPRUNE_FAULT": "backward@2:1:raise"}
    first, other = fork_ranks(
        given, tmp_path, ranks=2, environment=lambda rank: fault, before=read_fault
    )
    assert (first.code, other.code) == (1, 1), first.everything + other.everything
    assert other.err.startswith("[rank 1] Traceback (most recent call last):")
    assert other.err.endswith("[rank 1] RuntimeError: fail-point backward@2: raised\n")
    status = read_json(tmp_path / "out" / "status.json")
    assert (status["state"], status["error"]) == (
        "failed",
        "rank 1: RuntimeError: fail-point backward@2: raised",
    )


RANK_HOOK = """
import os, time
rank = os.environ.get("RANK")
if rank is not None:
    os.environ["HOME"] += rank
    time.sleep(float(os.environ.get("DELAY_RANK_0", "0")) if rank == "0" else 0)
    if rank != "0" and "LATER_FOLDER" in os.environ:
        os.chdir(os.environ["LATER_FOLDER"])
"""


@pytest.fixture
def hook(tmp_path: Path) -> dict[str, str]:
    """Returns an environment that makes the launcher's ranks differ: $HOME gets the rank's number."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(RANK_HOOK)
    return {"PYTHONPATH": f"{ROOT}:{tmp_path / 'hook'}", "HOME": str(tmp_path / "home")}


@pytest.mark.heavy
def test_launched_a_slow_rank_0_still_gets_to_tell(
    hook: dict[str, str], material: Path, tmp_path: Path
) -> None:
    """Checks a typo that rank 1 meets first. Its end would make the launcher kill rank 0."""
    ended = launch(
        arguments(material, tmp_path, "prune.rato=1"), environment=hook | {"DELAY_RANK_0": "2"}
    )
    assert_refused(ended, "prune.rato")
    assert ended.out.count("\n") == 1  # the launcher's own: the exit code


@pytest.mark.heavy
def test_launched_a_config_that_only_one_rank_lacks(
    hook: dict[str, str], material: Path, tmp_path: Path
) -> None:
    given = ["--config", "run.yaml", "--set", f"output_dir={tmp_path / 'out'}"]
    ended = launch(given, cwd=material, environment=hook | {"LATER_FOLDER": str(tmp_path)})
    assert ended.code == 2, ended.everything
    assert ended.err.startswith("error on rank 1: ")
    assert "run.yaml" in ended.err


def test_a_port_that_is_taken_is_named(material: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        first |= {"MASTER_ADDR": "127.0.0.1"}
        given = arguments(material, tmp_path)
        (ended,) = fork_ranks(given, tmp_path, environment=lambda rank: first)
    assert_refused(ended, f"127.0.0.1:{port}", "--master_port")


# What every first collective needs is made before any input is looked at

LOG = "COLLECTIVE_LOG"
NAMES = (
    "all_reduce",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "gather",
)


def log_collectives() -> None:
    """Makes torch.distributed write down its calls, in order."""

    def logged(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with open(os.environ[LOG], "a") as log:
            log.write(name + "\n")
        return original(*args, **kwargs)

    originals = {name: getattr(torch.distributed, name) for name in (*NAMES, "all_gather_object")}
    for name in (*originals, *RENAMED):
        old = RENAMED.get(name, name)
        setattr(torch.distributed, name, partial(logged, old, originals[old]))


def test_all_kinds_of_collectives_run_before_the_input_is_looked_at(tmp_path: Path) -> None:
    config = {
        "output_dir": "out",
        "train": {"steps": 1, "global_batch_size": 3, "micro_batch_size": 1},
    }
    given = ["--config", str(write_config(tmp_path / "run.yaml", config))]
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    where = {"cwd": tmp_path, "environment": lambda rank: {LOG: str(logs[rank])}}
    ended = fork_ranks(given, tmp_path, ranks=2, before=log_collectives, **where)  # type: ignore[arg-type]
    # 3 samples cannot be split over 2 ranks
    assert [rank.code for rank in ended] == [2, 2], ended[0].everything
    for log in logs:
        called = log.read_text().split()
        assert called[: called.index("all_gather_object")] == list(NAMES)
