"""Ranks take settings from the environment, and these reach the process groups."""

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraprune_ds import command
from loraprune_ds.errors import UserError
from loraprune_ds.zero.environment import check_local_rank, check_ranks, collective_timeout, gloo_interface
from tests.integration.launching import ROOT, clean_environment
from tests.ranks import RankPool


def test_a_rank_waits_an_hour_or_as_long_as_it_is_told() -> None:
    assert collective_timeout({}) == timedelta(minutes=60)
    assert collective_timeout({"DEEPSPEED_TIMEOUT": "240"}) == timedelta(hours=4)


@pytest.mark.parametrize("given", ["", "0", "-5", "1.5", "10m", "9" * 30])
def test_a_wrong_timeout_is_one_line(given: str) -> None:
    with pytest.raises(UserError, match=rf"^DEEPSPEED_TIMEOUT must be whole minutes from 1 to 525600; got '{given}'$"):
        collective_timeout({"DEEPSPEED_TIMEOUT": given})


ALONE_OF_TWO = "WORLD_SIZE is '2', but RANK is not set; start deepspeed, torchrun or srun, or unset it"


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        ({"DEEPSPEED_TIMEOUT": "soon"}, "DEEPSPEED_TIMEOUT must be whole minutes from 1 to 525600; got 'soon'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}, ALONE_OF_TWO),
    ],
)
@pytest.mark.parametrize(
    "given", [["launch/run.py", "--config", "launch/configs/quickstart.yaml"], ["launch/evaluate.py", "embedded"]]
)
def test_a_wrong_variable_is_told_before_deepspeed_trips_over_it(
    given: list[str], variable: dict[str, str], line: str, tmp_path: Path
) -> None:
    if "--config" in given:
        given = [*given, "--set", f"output_dir={tmp_path / 'out'}"]
    environment = clean_environment() | variable
    ended = subprocess.run(
        [sys.executable, *given], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (2, f"error: {line}\n")


RANK_1_OF_2 = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_a_rank_of_a_launcher_and_one_without_pass() -> None:
    kubeflow = {key: value for key, value in RANK_1_OF_2.items() if key != "LOCAL_RANK"}
    service = {"MASTER_PORT": "tcp://10.0.0.1:80"}  # what Kubernetes adds for a service called master
    for environment in (RANK_1_OF_2, kubeflow, {}, {"WORLD_SIZE": "1"}, service):
        check_ranks(environment)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"RANK": None}, ALONE_OF_TWO),
        ({"RANK": None, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', but RANK is not set; start deepspeed,"),
        (
            {"WORLD_SIZE": None},
            "RANK is '1', but WORLD_SIZE is not set; start deepspeed, torchrun or srun, or unset it",
        ),
        ({"MASTER_ADDR": None}, "RANK is '1', but MASTER_ADDR is not set;"),
        ({"MASTER_PORT": None}, "RANK is '1', but MASTER_PORT is not set;"),
        ({"RANK": "one"}, "RANK must be a whole number; got 'one'"),
        ({"RANK": "-1"}, "RANK must be a whole number; got '-1'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK must be a whole number; got ''"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be a whole number; got '2.0'"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT must be a whole number; got 'tcp://10.0.0.1:80'"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2; ranks are counted from 0"),
    ],
)
def test_what_describes_no_rank_is_one_line(
    change: dict[str, str | None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraprune_ds.zero.engine import start_ranks

    described = {key: value for key, value in (RANK_1_OF_2 | change).items() if value is not None}
    for name in RANK_1_OF_2:
        monkeypatch.delenv(name, raising=False)
    for name, value in described.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        start_ranks()


def test_a_rank_without_a_number_tells_its_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "GRACE", 0.0)
    monkeypatch.setenv("RANK", "one")
    command.tell(UserError("RANK must be a whole number"), agreed=False)
    assert capsys.readouterr().err == "error on rank one: RANK must be a whole number\n"


@pytest.mark.parametrize(
    ("nccl", "gloo"),
    [
        ("ib0", "ib0"),
        ("=ib0", "ib0"),
        ("eth,ib0,eth1", "ib0"),
        ("eth", None),  # to NCCL eth0 and eth1
        ("^ib0", None),
        ("^=ib0", None),
        ("", None),
    ],
)
def test_gloo_takes_the_interface_that_nccl_is_told_to(tmp_path: Path, nccl: str, gloo: str | None) -> None:
    for name in ("eth0", "eth1", "ib0", "lo"):
        (tmp_path / name).mkdir()
    wanted = {} if gloo is None else {"GLOO_SOCKET_IFNAME": gloo}
    assert gloo_interface({"NCCL_SOCKET_IFNAME": nccl}, tmp_path) == wanted


def test_an_interface_of_gloos_own_stays(tmp_path: Path) -> None:
    (tmp_path / "ib0").mkdir()
    assert gloo_interface({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0"}, tmp_path) == {}
    assert gloo_interface({}, tmp_path) == {}


def test_a_rank_that_does_not_see_its_device_is_told_how_to() -> None:
    check_local_rank({"RANK": "11", "LOCAL_RANK": "3"}, devices=4)
    with pytest.raises(UserError, match=r"^rank 11 has LOCAL_RANK 3 and sees 1 accelerator; .*--gpu-bind=none, not"):
        check_local_rank({"RANK": "11", "LOCAL_RANK": "3"}, devices=1)


def test_a_start_looks_for_its_device_before_it_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraprune_ds.zero import engine

    one_gpu = SimpleNamespace(device_count=lambda: 1, set_device=lambda number: pytest.fail("there is no such device"))
    monkeypatch.setattr(engine, "is_cpu", lambda: False)
    monkeypatch.setattr(engine, "accelerator", lambda: one_gpu)
    for name, value in RANK_1_OF_2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="rank 1 has LOCAL_RANK 1 and sees 1 accelerator;"):
        engine.start_ranks()


def start_alone(rank: int, world_size: int, folder: Path) -> None:
    for name in ("RANK", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_TIMEOUT": "77", "NCCL_SOCKET_IFNAME": "lo"}
    from loraprune_ds.zero.engine import start_ranks

    start_ranks()


def what_the_groups_have() -> tuple[list[timedelta], str | None]:
    """Returns the timeouts of the group of all ranks and of another one, and the interface of gloo."""
    world: Any = torch.distributed.group.WORLD
    other: Any = torch.distributed.new_group()
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in (world, other)]
    return timeouts, os.environ.get("GLOO_SOCKET_IFNAME")


def test_it_reaches_all_process_groups() -> None:
    pool = RankPool(setup=start_alone)
    try:
        assert pool.run(1, what_the_groups_have) == [([timedelta(minutes=77)] * 2, "lo")]
    finally:
        pool.close()
