"""QLoRA in transformers' Trainer: one process equals two ranks of DDP, a resume across cuts changes no bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import callback_run
from tests.support.driver import Job
from tests.support.families import heavy
from tests.support.ranks import RankPool
from tests.support.trainer_runs import REFIT, SAVES, Run, assert_same_course, resume_and_compare
from tests.support.trainers import WITHOUT, Setup, train_with_callback

BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.float32,
    "bnb_4bit_use_double_quant": True,
}
QLORA = Setup(quantised=BITS, fp32_lora=True)
STORED = {"torch.uint8", "torch.int8", "torch.float32"}


@pytest.mark.parametrize(
    ("compensate", "resumed_on"),
    [("least_squares", 1), heavy("none", 1), heavy("least_squares", 2)],
)
def test_one_process_equals_two_ranks_and_a_resume_across_a_cut_changes_no_bit(
    compensate: str,
    resumed_on: int,
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> None:
    job: Job = callback_run.make_job(tmp_path_factory.mktemp("tiny"))
    prune = REFIT | {"compensate": compensate}
    job = replace(job, batches=job.batches[:6], prune=prune)  # cuts after 2, 4 and 5
    runs: list[Run] = []
    for count in (1, 2):
        out = tmp_path / f"{count}"
        rows, weights = ranks.run(
            count, train_with_callback, job, out, SAVES | WITHOUT, None, QLORA
        )[0]
        runs.append(Run(rows, weights, out))
    alone, on_two = runs
    found = {str(weight.dtype) for weight in alone.weights.values()}
    assert found == (STORED if compensate == "least_squares" else STORED - {"torch.int8"})
    assert_same_course(on_two.rows, alone.rows, cuts=3)
    resume_and_compare(
        ranks, job, runs[resumed_on - 1], tmp_path / "same", 4, QLORA, resumed_on, **WITHOUT
    )
