"""Runs the shipped scripts on a Slurm of two nodes, where a job of higher priority interrupts one run."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import SHIPPED, obstacle, running_cluster
from tests.slurm.lab import Lab, Row
from tests.support.resuming import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
TIMEOUT = 600.0  # for what takes 40 s on an idle machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if why := obstacle():
        pytest.skip(f"no Slurm cluster can run here: {why}")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield Lab(cluster)


@pytest.mark.parametrize("script", sorted(path.name for path in SHIPPED.glob("*.sbatch")))
def test_slurm_accepts_the_script(lab: Lab, script: str) -> None:
    assert "to start at" in lab.cluster.execute(
        "sbatch", "--test-only", SHIPPED / script, "config.yaml"
    )


def test_a_preempted_run_keeps_the_same_groups_as_without_slurm(lab: Lab) -> None:
    """In fp32, without dropout and with the same number of ranks nothing differs."""
    job = lab.submit("patient")
    job.wait_for_step(lab.folder / "patient", 2, TIMEOUT)
    urgent = ("--nodes=2", "--exclusive", "--partition=high", "--output=/dev/null")
    lab.cluster.execute("sbatch", *urgent, "--wrap=sleep 1")
    row = Row("preempted", expected_restarts=(1,))
    lab.finish(row, job, "patient")
    assert row.good, (row, job.log())
    assert len(row.resumed_from) == 1
    assert losses(lab.folder / "patient") == losses(lab.straight_folder(2))
    assert "on node[1-2] with 1 ranks each" in job.log()
    assert "preflight: all 2 nodes are fit" in job.log()
