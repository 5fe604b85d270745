"""transformers' Trainer with the callback: equal to our own trainer, resumed bit by bit, not touched by evaluations."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.files import read_json
from tests.hf.trainers import resume_without_the_callback, stop_early, train_alone, train_with_callback
from tests.numerics.driver import Job, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

PRUNE = {"ratio": 0.4, "prune_every": 3, "channel_multiple": 1}  # of ten steps it cuts after 4, 7 and 9
REFIT = PRUNE | {"criterion": "gradient", "ranking": "global", "compensate": "least_squares"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny_llama(
        folder / "model", heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=160, layers=4, vocab=97, seed=1
    )
    adapter = write_adapter(folder / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=10, samples=8, tokens=16, vocab=97, seed=3)
    return Job(model, adapter, batches, PRUNE, max_grad_norm=0.5)


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_the_callback_cuts_as_our_own_trainer(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    own, (foreign, _) = ranks.run(2, train_alone, job)[0], ranks.run(2, train_with_callback, job, tmp_path, {})[0]
    cuts = sum(before["kept"] != after["kept"] for before, after in pairwise(own))
    assert cuts == 3
    for step, (ours, theirs) in enumerate(zip(own, foreign, strict=True), start=1):
        # The sums of a batch's losses differ in their order: six digits of fp32.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6), step
        assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-6), step
        assert theirs["kept"] == ours["kept"], step
    report = read_json(tmp_path / "report.json")
    assert [cut["step"] for cut in report["prune_steps"]] == [4, 7, 9]
    assert report["params"]["pruned"] < report["params"]["dense"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"kept_groups.json", "kept_groups.png", "training.png", "metrics.jsonl"}


@pytest.mark.parametrize("prune", [PRUNE, REFIT], ids=["sliced", "refitted"])
def test_a_resume_across_a_cut_changes_no_bit(ranks: RankPool, job: Job, tmp_path: Path, prune: dict[str, Any]) -> None:
    job = replace(job, prune=prune)
    saves = {"save_strategy": "steps", "save_steps": 5}
    rows, weights = ranks.run(2, train_with_callback, job, tmp_path / "a", saves)[0]
    again, resumed = ranks.run(2, train_with_callback, job, tmp_path / "b", {}, str(tmp_path / "a/checkpoint-5"))[0]
    assert [row["loss"] for row in again] == [row["loss"] for row in rows[5:]]
    assert [row["kept"] for row in again] == [row["kept"] for row in rows[5:]]
    assert_equal_bits(resumed, weights)
    report = read_json(tmp_path / "b/report.json")
    assert ([cut["step"] for cut in report["prune_steps"]], report["resumed_from"]) == ([4, 7, 9], [5])


def test_an_evaluation_between_cuts_changes_nothing(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    job = replace(job, prune=PRUNE | {"prune_every": 2, "cooldown_fraction": 0.6})  # cuts after 3 and 4
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 20}
    plain, weights = ranks.run(2, train_with_callback, job, tmp_path / "a", {})[0]
    rows, same = ranks.run(2, train_with_callback, job, tmp_path / "b", evaluated)[0]
    assert [(row["loss"], row["norm"], row["kept"]) for row in rows] == [
        (row["loss"], row["norm"], row["kept"]) for row in plain
    ]
    assert_equal_bits(same, weights)
    assert rows[-1]["gathered"] == plain[-1]["gathered"]  # the order of modules is recorded anew meanwhile


def test_stopping_early_and_half_gradients_are_warned_of(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    first, second = ranks.run(2, stop_early, replace(job, dtype="bfloat16"), tmp_path)
    assert len(first) == 1
    assert first[0].startswith("training stopped at step 2, before the last cut at step 17: 0.0 % of 40.0 %")
    assert second == []  # one rank says it


def test_a_resume_that_forgets_the_callback_is_refused(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    ranks.run(2, train_with_callback, job, tmp_path / "a", {"save_strategy": "steps", "save_steps": 3, "max_steps": 6})
    for step in (3, 6):  # before and after the first cut
        checkpoint = str(tmp_path / f"a/checkpoint-{step}")
        error = ranks.run(2, resume_without_the_callback, job, tmp_path / "b", checkpoint)[0]
        assert error.startswith("UserError: "), error
        assert "pruning.resume(trainer.model, folder)" in error
