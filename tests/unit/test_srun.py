"""Ranks are read from the variables that srun sets for its tasks, if no launcher has set them."""

import os

import pytest

from loraprune_ds.command import adopt_srun_ranks, srun_ranks

TASK = {
    "SLURM_JOB_ID": "7001",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert srun_ranks(TASK) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "27003",
    }


def test_the_ranks_meet_at_the_first_node() -> None:
    first = {
        "node1": "node1",
        "node[1-2]": "node1",
        "gpu[007,009-012]": "gpu007",
        "a[2-3,5],b7": "a2",
        "login,gpu[1-4]": "login",
        "rack[1-2]-node[03,05]": "rack1-node03",
        "ip-10-0-0-[17-18]": "ip-10-0-0-17",
    }
    assert {nodes: srun_ranks(TASK | {"SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] for nodes in first} == first


def test_a_meeting_point_that_is_given_stays() -> None:
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert srun_ranks(TASK | given).items() >= given.items()


def test_the_port_is_an_ordinary_one() -> None:
    for job in map(str, range(1, 70_000, 997)):
        assert 20_000 <= int(srun_ranks(TASK | {"SLURM_JOB_ID": job})["MASTER_PORT"]) < 32_000, job


def test_a_batch_script_is_no_task() -> None:
    """It has SLURM_PROCID and SLURM_NTASKS, too, but without srun it starts one process."""
    batch = {"SLURM_JOB_ID": "7001", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert srun_ranks(batch) == {}
    assert srun_ranks({}) == {}


def test_a_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below `srun deepspeed` both have set variables."""
    for name, value in {**TASK, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    adopt_srun_ranks()
    assert os.environ["RANK"] == "0"
    assert "WORLD_SIZE" not in os.environ
