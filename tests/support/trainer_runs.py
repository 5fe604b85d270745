"""Runs a Trainer with the callback, and compares it with our own trainer."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support import callback_run
from tests.support.driver import Job
from tests.support.ranks import RankPool
from tests.support.resuming import assert_equal_tensors
from tests.support.trainers import PLAIN, Setup, train_with_callback

PRUNE = callback_run.PRUNE  # cuts after 3, 5 and 7
REFIT = PRUNE | {
    "criterion": "fisher",
    "ranking": "global",
    "normalize": "none",
    "compensate": "least_squares",
}
SAVES = {"save_strategy": "steps", "save_steps": 2}


def course(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["loss"], row["norm"], row["rate"], row["tokens"], row["kept"]) for row in rows]


@dataclass(frozen=True)
class Run:
    """Holds what a training with the callback left: its rows, its last weights, and its folder with checkpoints."""

    rows: list[dict[str, Any]]
    weights: dict[str, Tensor]
    out: Path


def assert_same_course(
    foreign: list[dict[str, Any]], own: list[dict[str, Any]], *, cuts: int, norms: float = 1e-6
) -> None:
    assert sum(before["kept"] != after["kept"] for before, after in pairwise(own)) == cuts
    for step, (ours, theirs) in enumerate(zip(own, foreign, strict=True), start=1):
        # The sums of a batch's losses differ in their order: six digits of fp32.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6), step
        assert theirs["norm"] == pytest.approx(ours["norm"], rel=norms), step
        assert (theirs["kept"], theirs["tokens"]) == (ours["kept"], ours["tokens"]), step


def resume_and_compare(
    pool: RankPool,
    job: Job,
    run: Run,
    out: Path,
    step: int,
    setup: Setup = PLAIN,
    ranks: int = 2,
    **more: Any,
) -> None:
    checkpoint = str(run.out / f"checkpoint-{step}")
    again, resumed = pool.run(ranks, train_with_callback, job, out, more, checkpoint, setup)[0]
    assert course(again) == course(run.rows[step:])
    assert run.rows[step - 1]["kept"] != run.rows[-1]["kept"]
    assert_equal_tensors(resumed, run.weights)
