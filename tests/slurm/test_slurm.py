"""Runs the shipped scripts on a Slurm of two nodes. A job of higher priority interrupts one run.

events.py has the other events of a job. It takes longer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.launching import fork_ranks, read_json
from tests.integration.resuming import losses, write_run
from tests.slurm.cluster import SHIPPED, Cluster, Job, obstacle, running_cluster

STEPS = 10  # cuts after steps 4, 6, 9
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
TIMEOUT = 600.0  # for what takes 40 s on an idle machine
TINY = {
    "lora": {"lora_dropout": 0.0},
    "prune": {"channel_multiple": 1, "prune_every": 3},
    "train": {"steps": STEPS, "global_batch_size": 2},
    "checkpoint": {"every": 4, "keep_last": 2},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := obstacle():
        pytest.skip(f"no Slurm cluster can run here: {why}")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@dataclass(frozen=True)
class Jobs:
    """Holds three jobs. `urgent` took the nodes from `patient`. `straight` ran on two ranks without Slurm."""

    urgent: Job
    patient: Job
    folder: Path

    def out(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> Jobs:
    folder = cluster.folder
    config = write_run(folder, **TINY)
    patient = cluster.submit("prune.sbatch", config, "--set", f"output_dir={folder / 'patient'}")
    patient.wait_for_step(folder / "patient", 2, TIMEOUT)
    urgent = cluster.submit(
        "prune.sbatch", config, "--set", f"output_dir={folder / 'urgent'}", options=("--partition=high",)
    )
    assert urgent.wait_for_end(TIMEOUT) == "COMPLETED", urgent.log()
    assert patient.wait_for_end(TIMEOUT) == "COMPLETED", patient.log()
    arguments = ["--config", str(config), "--set", f"output_dir={folder / 'straight'}"]
    fork_ranks(arguments, folder, ranks=2, timeout=TIMEOUT)[0].check()
    return Jobs(urgent, patient, folder)


@pytest.mark.parametrize("script", sorted(path.name for path in SHIPPED.glob("*.sbatch")))
def test_slurm_accepts_the_script(cluster: Cluster, script: str) -> None:
    assert "to start at" in cluster.execute("sbatch", "--test-only", SHIPPED / script, "config.yaml")


def test_a_run_on_two_nodes_keeps_the_same_groups_as_without_slurm(jobs: Jobs) -> None:
    log = jobs.urgent.log()
    assert "on node[1-2] with 1 ranks each" in log
    assert "preflight: all 2 nodes are fit" in log
    assert jobs.urgent.restarts == 0
    assert read_json(jobs.out("urgent") / "report.json")["resumed_from"] == []
    check_same_result(jobs, "urgent")


def test_a_preempted_run_is_requeued_once_and_ends_as_if_nothing_had_happened(jobs: Jobs) -> None:
    assert jobs.patient.restarts == 1, jobs.patient.log()
    assert len(read_json(jobs.out("patient") / "report.json")["resumed_from"]) == 1
    check_same_result(jobs, "patient")


def check_same_result(jobs: Jobs, name: str) -> None:
    """Compares in fp32, without dropout and with the same number of ranks. Nothing differs."""
    found, expected = jobs.out(name), jobs.out("straight")
    assert (found / "kept_groups.json").read_bytes() == (expected / "kept_groups.json").read_bytes()
    assert losses(found) == losses(expected)
