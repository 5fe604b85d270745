"""The callback without DeepSpeed: one process equals DDP's ranks and ZeRO-3, a resume changes no bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hf import callback_run
from tests.hf.test_trainer import REFIT, SAVES, Run, assert_same_course, resume_and_compare
from tests.hf.trainers import Setup, train_alone, train_with_callback
from tests.numerics.driver import Job
from tests.ranks import RankPool

WITHOUT: dict[str, Any] = {"deepspeed": None}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = callback_run.make_job(tmp_path_factory.mktemp("tiny"))
    return replace(job, batches=job.batches[:6], prune=REFIT)  # cuts after 2, 4 and 5


@pytest.fixture(scope="module")
def runs(ranks: RankPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """In one process, and on two ranks of DDP."""
    outs = [tmp_path_factory.mktemp("out") for _ in range(2)]
    saves = SAVES | WITHOUT
    return [Run(*ranks.run(n, train_with_callback, job, out, saves)[0], out) for n, out in enumerate(outs, 1)]


def test_one_process_equals_two_ranks_and_zero_3(ranks: RankPool, job: Job, runs: list[Run]) -> None:
    alone, on_two = runs
    assert_same_course(alone.rows, ranks.run(1, train_alone, job)[0], cuts=3)
    assert_same_course(on_two.rows, alone.rows, cuts=3)
    assert all(on_two.weights[name].shape == tensor.shape for name, tensor in alone.weights.items())


def test_the_paper_s_criterion_scores_gradients_that_are_not_clipped(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    job = replace(job, prune=callback_run.PRUNE)
    own = ranks.run(1, train_alone, job)[0]
    assert min(row["norm"] for row in own) > job.max_grad_norm
    for setup in (Setup(), Setup(reference=True, reentrant=False)):
        rows, _ = ranks.run(2, train_with_callback, job, tmp_path, WITHOUT, None, setup)[0]
        assert_same_course(rows, own, cuts=3)


def test_a_resume_across_a_cut_changes_no_bit_and_needs_no_second_rank(
    ranks: RankPool, job: Job, runs: list[Run], tmp_path: Path
) -> None:
    alone, on_two = runs
    resume_and_compare(ranks, job, alone, tmp_path / "same", 4, ranks=1, **WITHOUT)
    checkpoint = str(on_two.out / "checkpoint-2")
    again, _ = ranks.run(1, train_with_callback, job, tmp_path / "fewer", WITHOUT, checkpoint)[0]
    assert_same_course(again, alone.rows[2:], cuts=2)
