"""The callback without DeepSpeed: one process equals DDP's ranks and ZeRO-3, a resume changes no bit."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import callback_run
from tests.support.driver import Job
from tests.support.ranks import RankPool
from tests.support.trainer_runs import REFIT, SAVES, Run, assert_same_course, resume_and_compare
from tests.support.trainers import WITHOUT, train_alone, train_with_callback


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = callback_run.make_job(tmp_path_factory.mktemp("tiny"))
    return replace(job, batches=job.batches[:6], prune=REFIT)  # cuts after 2, 4 and 5


@pytest.fixture(scope="module")
def runs(ranks: RankPool, job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """In one process, and on two ranks of DDP."""
    outs = [tmp_path_factory.mktemp("out") for _ in range(2)]
    saves = SAVES | WITHOUT
    return [
        Run(*ranks.run(n, train_with_callback, job, out, saves)[0], out)
        for n, out in enumerate(outs, 1)
    ]


def test_one_process_equals_two_ranks_and_zero_3(
    ranks: RankPool, job: Job, runs: list[Run]
) -> None:
    alone, on_two = runs
    assert_same_course(alone.rows, ranks.run(1, train_alone, job)[0], cuts=3)
    assert_same_course(on_two.rows, alone.rows, cuts=3)
    assert all(on_two.weights[name].shape == tensor.shape for name, tensor in alone.weights.items())


def test_a_resume_across_a_cut_changes_no_bit_and_needs_no_second_rank(
    ranks: RankPool, job: Job, runs: list[Run], tmp_path: Path
) -> None:
    alone, on_two = runs
    resume_and_compare(ranks, job, alone, tmp_path / "same", 4, ranks=1, **WITHOUT)
    checkpoint = str(on_two.out / "checkpoint-2")
    again, _ = ranks.run(1, train_with_callback, job, tmp_path / "fewer", WITHOUT, checkpoint)[0]
    assert_same_course(again, alone.rows[2:], cuts=2)


def test_a_checkpoint_without_files_of_its_optimizer_goes_on_from_the_folder_of_pruning(
    ranks: RankPool, job: Job, tmp_path: Path
) -> None:
    falling: dict[str, Any] = {"lr_scheduler_type": "linear"} | WITHOUT
    straight = Run(*ranks.run(1, train_with_callback, job, tmp_path, SAVES | falling)[0], tmp_path)
    assert len({row["rate"] for row in straight.rows}) == len(job.batches)
    # as save_only_model
    lost = (
        ["optimizer.pt", "adapter_model.safetensors"],
        ["scheduler.pt"],
        ["optimizer.pt", "scheduler.pt", "rng_state.pth"],
    )
    for n, names in enumerate(lost):
        run = replace(straight, out=tmp_path / f"{n}")
        checkpoint = shutil.copytree(tmp_path / "checkpoint-4", run.out / "checkpoint-4")
        for name in names:
            (checkpoint / name).unlink()
        resume_and_compare(ranks, job, run, tmp_path / f"on-{n}", 4, ranks=1, **falling)


def test_a_checkpoint_goes_on_on_another_engine_and_other_ranks(
    ranks: RankPool, job: Job, tmp_path: Path
) -> None:
    more = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
    straight, _ = ranks.run(1, train_with_callback, job, tmp_path / "0", more | WITHOUT)[0]
    rows = straight[:2]
    for n, (engine, steps) in enumerate([({}, 2), (WITHOUT, 2)]):
        checkpoint = str(tmp_path / f"{n}" / f"checkpoint-{len(rows)}")
        again, _ = ranks.run(
            2, train_with_callback, job, tmp_path / f"{n + 1}", more | engine, checkpoint
        )[0]
        rows += again[:steps]
    assert_same_course(rows, straight, cuts=3)
