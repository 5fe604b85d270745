"""Ranks take settings from the environment, and the commands in launch/ end as they should."""

import os
import socket
import subprocess
import sys
from argparse import Namespace
from contextlib import closing
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from launch import quickstart_answers, quickstart_steps
from loraprune_ds import errors
from loraprune_ds.arguments import COMMANDS, require_option
from loraprune_ds.cli import run
from loraprune_ds.errors import RankError, UserError, tell
from loraprune_ds.local.engine import Local
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.job import (
    LAUNCHED,
    adopt_srun_ranks,
    check_local_rank,
    check_ranks,
    gloo_interface,
    launcher_command,
    srun_ranks,
)
from tests.support.launching import ROOT, run_to_end
from tests.support.ranks import RankPool
from tests.support.refusals import must_name

BLOCKED = """
import threading, time, torch
from loraprune_ds.errors import leave_on_error

leave_on_error()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
threading.Thread(target=time.sleep, args=(60,)).start()  # Python waits for it before it ends
raise RuntimeError("out of memory")
"""


def test_an_option_without_the_one_it_needs_is_named() -> None:
    require_option(
        Namespace(num_fewshot=None, tasks=[], page=False), "tasks", "num_fewshot", "page", "absent"
    )
    require_option(
        Namespace(num_fewshot=0, tasks=["piqa"], page=True), "tasks", "num_fewshot", "page"
    )
    for option, value in (("num_fewshot", 0), ("include_path", "x")):
        given = Namespace(tasks=[], **{option: value})
        must_name(
            f"--{option.replace('_', '-')} --tasks", require_option, given, "tasks", "limit", option
        )


@pytest.mark.parametrize(
    ("rank", "error", "agreed", "line"),
    [
        ("0", UserError("a"), True, "error: a\n"),
        ("1", UserError("a"), True, ""),
        ("1", UserError("a"), False, "error on rank 1: a\n"),
        ("0", RankError("a"), True, "error: a\n"),
        ("1", RankError("a"), True, "error on rank 1: a\n"),
        ("one", UserError("a"), False, "error on rank one: a\n"),
    ],
)
def test_what_a_rank_met_alone_it_tells_itself(
    rank: str,
    error: UserError,
    agreed: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("loraprune_ds.errors.GRACE", 0.0)
    tell(error, agreed=agreed)
    assert capfd.readouterr().err == line


def test_an_unexpected_error_ends_the_process_right_after_its_traceback() -> None:
    ended = run_to_end([sys.executable, "-c", BLOCKED], cwd=ROOT, timeout=30)
    assert ended.code == 1
    assert ended.err.startswith("Traceback (most recent call last):")
    assert ended.err.endswith("RuntimeError: out of memory\n")
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()  # so nothing reads the traceback
    assert process.wait(timeout=30) == 1


def test_in_another_tool_only_our_errors_become_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    others = Mock()
    monkeypatch.setattr(sys, "excepthook", others)
    errors.shorten_errors()
    for error in (UserError("a"), ValueError("b")):
        sys.excepthook(type(error), error, None)
    assert capfd.readouterr().err == "error: a\n"
    others.assert_called_once()


def test_a_planned_fault_strikes_one_rank_at_its_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    struck = Mock()
    monkeypatch.setattr(os, "kill", struck)
    monkeypatch.setattr(errors, "FAULT", "made up@2:0:9")
    errors.fail_point("made up")
    struck.assert_not_called()
    errors.fail_point("made up")
    struck.assert_called_once_with(os.getpid(), 9)
    monkeypatch.setattr(errors, "FAULT", "made up@3:0:raise")
    with pytest.raises(RuntimeError, match="made up@3"):
        errors.fail_point("made up")


# What ranks take from the environment


def test_the_launcher_chooses_the_gpus_unless_a_number_is_given() -> None:
    assert "--num_accelerators" not in launcher_command(
        "some.module", None, {"CUDA_VISIBLE_DEVICES": "2,3"}
    )
    words = launcher_command("some.module", 3, {})
    assert words[words.index("--num_accelerators") + 1] == "3"
    assert words[-2:] == ["--module", "some.module"]
    two = {"CUDA_VISIBLE_DEVICES": "2,3"}
    must_name("--ranks CUDA_VISIBLE_DEVICES=2,3", launcher_command, "some.module", 2, two)


@pytest.mark.parametrize(
    ("script", "variable"),
    [
        ("run", {"DEEPSPEED_TIMEOUT": "soon"}),
        ("evaluate", {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29599"}),
    ],
)
def test_a_wrong_variable_is_told_first(
    script: str, variable: dict[str, str], tmp_path: Path
) -> None:
    run = ["--config", "launch/configs/quickstart.yaml", "--set", f"output_dir={tmp_path / 'out'}"]
    given = [f"launch/{script}.py", *(run if script == "run" else ["embedded"])]
    ended = run_to_end([sys.executable, *given], cwd=ROOT, environment=variable, timeout=60)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert next(iter(variable)) in ended.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_without_the_environment_names_what_is_missing(command: str) -> None:
    # without site-packages
    python = [sys.executable, "-S", f"launch/{command}.py", "--help"]
    ended = run_to_end(python, cwd=ROOT, environment={"PYTHONPATH": ""}, timeout=30)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert f"{sys.executable} has no loraprune_ds" in ended.err
    assert "launch/quickstart.sh" in ended.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_script_starts_the_command_of_its_name(command: str) -> None:
    ended = run_to_end([sys.executable, f"launch/{command}.py", "--help"], cwd=ROOT, timeout=30)
    assert (ended.code, ended.err) == (0, "")
    about = import_module(f"loraprune_ds.cli.{command}").__doc__ or ""
    assert about.splitlines()[0] in ended.out


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_every_rank_reads_its_input_once(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    read = Mock(return_value=None)  # as without a text
    assert Communicator().first_per_node(read) is None
    read.assert_called_once()


RANK_1_OF_2 = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_a_rank_of_a_launcher_and_one_without_pass() -> None:
    kubeflow = {key: value for key, value in RANK_1_OF_2.items() if key != "LOCAL_RANK"}
    # what Kubernetes adds for a service called master
    service = {"MASTER_PORT": "tcp://10.0.0.1:80"}
    for environment in (RANK_1_OF_2, kubeflow, {}, {"WORLD_SIZE": "1"}, service):
        check_ranks(environment)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"RANK": None}, "WORLD_SIZE RANK"),
        ({"RANK": None, "WORLD_SIZE": "two"}, "WORLD_SIZE 'two' RANK"),
        *(({name: None}, name) for name in LAUNCHED if name != "RANK"),
        ({"RANK": "-1"}, "RANK '-1'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK ''"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT"),
        ({"RANK": "2"}, "RANK 2 WORLD_SIZE"),
    ],
)
def test_what_describes_no_rank_is_named(change: dict[str, str | None], names: str) -> None:
    described = {key: value for key, value in (RANK_1_OF_2 | change).items() if value is not None}
    must_name(names, check_ranks, described)


# To NCCL "eth" is eth0 and eth1.
@pytest.mark.parametrize(
    ("nccl", "gloo"),
    [
        ("ib0", "ib0"),
        ("=ib0", "ib0"),
        ("eth,ib0,eth1", "ib0"),
        ("eth", None),
        ("^ib0", None),
        ("", None),
    ],
)
def test_gloo_takes_the_interface_that_nccl_is_told_to(
    monkeypatch: pytest.MonkeyPatch, nccl: str, gloo: str | None
) -> None:
    monkeypatch.setattr(
        socket, "if_nameindex", lambda: list(enumerate(("lo", "eth0", "eth1", "ib0"), start=1))
    )
    wanted = {} if gloo is None else {"GLOO_SOCKET_IFNAME": gloo}
    assert gloo_interface({"NCCL_SOCKET_IFNAME": nccl}) == wanted
    assert gloo_interface({"NCCL_SOCKET_IFNAME": nccl, "GLOO_SOCKET_IFNAME": "eth0"}) == {}


def test_a_start_looks_for_its_device_before_it_meets_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from loraprune_ds.zero import engine

    one_gpu = SimpleNamespace(
        device_count=lambda: 1, set_device=lambda number: pytest.fail("there is no such device")
    )
    monkeypatch.setattr(engine, "is_cpu", lambda: False)
    monkeypatch.setattr(engine, "accelerator", lambda: one_gpu)
    for name, value in RANK_1_OF_2.items():
        monkeypatch.setenv(name, value)
    must_name("rank 1 LOCAL_RANK --gpu-bind", engine.Zero3().start_ranks)
    check_local_rank(RANK_1_OF_2, devices=2)


def test_one_process_is_not_several(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "--config",
        "launch/configs/quickstart.yaml",
        "--set",
        "deepspeed=null",
        "--ranks",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["run", *given])
    must_name("--ranks 2: deepspeed: null", run.launch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    must_name("deepspeed: null 2 ranks", Local().start_ranks)


def start_alone(rank: int, world_size: int, folder: Path) -> None:
    for name in ("RANK", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    os.environ |= {"DS_ACCELERATOR": "cpu", "DEEPSPEED_TIMEOUT": "77", "NCCL_SOCKET_IFNAME": "lo"}
    from loraprune_ds.zero.engine import Zero3

    Zero3().start_ranks()


def describe_groups() -> tuple[list[timedelta], str | None]:
    """Returns the timeouts of the group of all ranks and of another one, and the interface of gloo."""
    world: Any = torch.distributed.group.WORLD
    other: Any = torch.distributed.new_group()
    timeouts = [
        group._get_backend(torch.device("cpu")).options._timeout for group in (world, other)
    ]
    return timeouts, os.environ.get("GLOO_SOCKET_IFNAME")


def test_the_timeout_reaches_all_process_groups() -> None:
    with closing(RankPool(start_alone, fresh=True)) as pool:
        assert pool.run(1, describe_groups) == [([timedelta(minutes=77)] * 2, "lo")]


# Ranks that srun starts without a launcher

TASK = {"SLURM_JOB_ID": "7001", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4"}
TASK |= {"SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_a_task_of_a_step_is_a_rank() -> None:
    ranks = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "27003",
    }
    assert srun_ranks(TASK) == ranks
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert srun_ranks(TASK | given) == ranks | given
    batch = {"SLURM_JOB_ID": "7001", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert srun_ranks(batch) == {}  # a batch script, which starts one process without srun


def test_the_ranks_meet_at_the_first_node_and_an_ordinary_port() -> None:
    first = {
        "node1": "node1",
        "node[1-2]": "node1",
        "gpu[007,009-012]": "gpu007",
        "a[2-3,5],b7": "a2",
        "login,gpu[1-4]": "login",
        "rack[1-2]-node[03,05]": "rack1-node03",
        "ip-10-0-0-[17-18]": "ip-10-0-0-17",
    }
    assert {
        nodes: srun_ranks(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] for nodes in first
    } == first
    for job in map(str, range(1, 70_000, 997)):
        assert 20_000 <= int(srun_ranks(TASK | {"SLURM_JOB_ID": job})["MASTER_PORT"]) < 32_000, job


def test_a_launcher_below_srun_chooses_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    adopt_srun_ranks()
    assert (os.environ["RANK"], os.environ.get("WORLD_SIZE")) == ("0", None)


# The quickstart makes as many steps as take ten minutes, or as many as the run began with


@pytest.mark.parametrize(
    ("product", "steps"), [(quickstart_steps.PRODUCT, 50), (10 * quickstart_steps.PRODUCT, 20)]
)
def test_a_slow_cpu_makes_fewer_steps(
    product: float,
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert 0 < quickstart_steps.product_seconds() < 10
    monkeypatch.setattr(quickstart_steps, "product_seconds", lambda: product)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    quickstart_steps.main()
    told = capsys.readouterr()
    assert told.out == f"{steps}\n"
    assert told.err.startswith("expected: ")
    assert ("instead of 50" in told.err) == (steps < 50)

    (tmp_path / "config.yaml").write_text("train: {steps: 30}")  # of a start on another machine
    quickstart_steps.main()
    assert capsys.readouterr().out == "30\n"


def test_answers_stand_side_by_side() -> None:
    left, right = "a short line\n\nand one", " ".join(["word"] * 30)
    rows = quickstart_answers.side_by_side(left, right).split("\n")
    assert rows[0].startswith("a short line" + " " * 30)
    assert rows[2].startswith("and one")
    assert " ".join(row[quickstart_answers.WIDTH :].strip() for row in rows) == right
    assert max(map(len, rows)) <= 2 * quickstart_answers.WIDTH + 2


def test_an_answer_without_an_end_is_cut_to_a_few_rows() -> None:
    rows = quickstart_answers.side_by_side("short", "sleep " * 300).split("\n")
    assert len(rows) == quickstart_answers.ROWS
    assert rows[-1].strip() == "..."
