"""The sharded trainer against the oracle, an independent dense process, on 1, 2 and 3 real ZeRO-3 ranks.

Both compute in fp32 and sum in different orders. The oracle's fp32 differs from its fp64 by 2e-6 in scores and 8e-7 in
the loss, so the tolerance of 1e-5 is about five times pure rounding. Masks are compared across a gap of more than ten
tolerances between the last group that stays and the first that goes. What a cut only moves is compared bit by bit.

Adam's epsilon is 1e-3. Some LoRA directions of k_proj have a gradient of rounding alone, since softmax ignores a common
shift. With 1e-8 Adam would turn that rounding into full-size steps.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracle.dense_trainer import DenseTrainer, StepRecord
from tests.oracle.formula import cut_gap
from tests.support.driver import Job, Outcome, assert_same_outcome, dense_twin, tiny_job, train
from tests.support.families import heavy
from tests.support.paper import OPEN
from tests.support.ranks import RankPool

TOLERANCE = 1e-5
STEPS = 10
MODELS = {
    "gqa_odd": {"heads": 8, "kv_heads": 4, "head_dim": 8, "hidden": 64, "ffn": 173, "biases": True},
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 12, "hidden": 56, "ffn": 96, "tie": True},
}
PRUNE = {"ratio": 0.3, "prune_every": 3}


@pytest.fixture(scope="module", params=MODELS)
def base_job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_job(folder, PRUNE, steps=STEPS, model=MODELS[request.param] | {"layers": 4})


def dense_run(job: Job, outcome: Outcome) -> tuple[DenseTrainer, list[StepRecord]]:
    """Runs the oracle. It is told how many groups to keep but not which."""
    micro = job.micro_batch_size if job.lora_dropout else None
    settings = {
        "max_grad_norm": job.max_grad_norm,
        "epsilon": job.adam_epsilon,
        "dropout": job.lora_dropout,
    }
    trainer = dense_twin(job, micro_batch_size=micro, **settings)
    counts = {
        step: [(len(h), len(c)) for h, c in outcome.kept[step - 1]] for step in outcome.cut_steps
    }
    return trainer, trainer.run(job.batches, [job.learning_rate] * STEPS, counts)


def assert_masks_are_decided(outcome: Outcome, records: list[StepRecord]) -> None:
    """Checks that rounding could not have swapped two groups. Otherwise equal masks would mean nothing."""
    for step in outcome.cut_steps:
        for averages, kept in zip(records[step - 1].averages, outcome.kept[step - 1], strict=True):
            for scores, groups in zip(averages, kept, strict=True):
                if len(groups) < len(scores):
                    assert cut_gap(scores, len(groups)) > 10 * TOLERANCE


def relative(found: Tensor, expected: Tensor) -> float:
    return float(
        (
            (found.double() - expected.double()).abs() / expected.double().abs().clamp_min(1e-12)
        ).max()
    )


# ranks, micro-batch and dropout
ODD = [(0, 6, 0.05), (1, 12, 0.0), (1, 6, 0.05), (2, 6, 0.0), (2, 3, 0.05), (3, 4, 0.0)]
ODD += [(3, 2, 0.05)]
MHA = [(2, 3, 0.05), (3, 4, 0.0)]


@pytest.mark.parametrize(
    ("base_job", "world_size", "micro", "dropout"),
    [
        *[("gqa_odd", *case) for case in ODD],
        *[("mha", *case) for case in MHA],
        *[heavy("mha", *case) for case in ODD if case not in MHA],
    ],
    indirect=["base_job"],
)
def test_training_and_cuts(
    ranks: RankPool, base_job: Job, world_size: int, micro: int, dropout: float
) -> None:
    """Without a rank of ZeRO-3 (0), one process trains by the local engine."""
    changes = {"micro_batch_size": micro, "max_grad_norm": 0.5, "lora_dropout": dropout}
    job = replace(base_job, **changes, deepspeed=base_job.deepspeed if world_size else None)
    outcomes = ranks.run(max(1, world_size), train, job)
    outcome = outcomes[0]
    oracle, records = dense_run(job, outcome)

    assert outcome.cut_steps == [4, 7, 9]
    assert_masks_are_decided(outcome, records)
    for step, record in enumerate(records):
        assert abs(outcome.losses[step] - record.loss) < TOLERANCE
        assert outcome.kept[step] == [(list(h), list(c)) for h, c in record.kept]
        if step < outcome.cut_steps[-1]:  # the package stops scoring after its last cut
            for found, expected in zip(outcome.averages[step], record.averages, strict=True):
                assert relative(found[0], expected[0]) < TOLERANCE
                assert relative(found[1], expected[1]) < TOLERANCE
    for name, master in oracle.masters().items():
        assert (outcome.masters[name] - master).abs().max() < TOLERANCE, name
    # first and second moments. Differences are relative to the largest: they have gradients' units
    for i in (0, 1):
        largest = max(moments[i].abs().max() for moments in oracle.moments().values())
        for name, moments in oracle.moments().items():
            assert (outcome.moments[name][i] - moments[i]).abs().max() < TOLERANCE * largest, name
    frozen = oracle.frozen()
    assert {name.removeprefix("model.") for name in outcome.frozen} == set(frozen)
    for name, weight in outcome.frozen.items():
        assert torch.equal(weight, frozen[name.removeprefix("model.")]), name
    assert all(found == expected for found, expected in outcome.state_bytes)
    for other in outcomes[1:]:
        assert other.kept == outcome.kept
        assert other.losses == outcome.losses


# What follows does not depend on the shape of a model: one is enough.
one_model = pytest.mark.parametrize("base_job", ["gqa_odd"], indirect=True)


@one_model
@pytest.mark.parametrize("world_size", [heavy(1), 2])
def test_gradient_checkpointing_changes_nothing(
    ranks: RankPool, base_job: Job, world_size: int
) -> None:
    job = replace(base_job, lora_dropout=0.1)  # the same draw again
    jobs = (replace(job, gradient_checkpointing=on) for on in (False, True))
    plain, checkpointed = (ranks.run(world_size, train, each)[0] for each in jobs)
    # the same operations on the same numbers, only some of them twice
    assert_same_outcome(checkpointed, plain)


@one_model
def test_a_seed_decides_the_result_and_its_dropout(ranks: RankPool, base_job: Job) -> None:
    """In one process. That dropout is the same on ranks is seen above, and that resumes are in test_resume."""
    job = replace(base_job, lora_dropout=0.1, dtype="bfloat16", deepspeed=None)
    first, same, other = (ranks.run(1, train, replace(job, seed=seed))[0] for seed in (0, 0, 1))
    assert_same_outcome(first, same)
    assert other.losses != first.losses


def test_global_ranking_reaches_its_target_on_any_number_of_ranks(
    ranks: RankPool, tmp_path: Path
) -> None:
    prune = PRUNE | OPEN | {"ranking": "global", "normalize": "none"}
    job = tiny_job(tmp_path, prune, steps=STEPS, model=MODELS["gqa_odd"] | {"layers": 4, "seed": 4})
    alone = replace(job, deepspeed=None)
    outcomes = [ranks.run(1, train, alone)[0], ranks.run(3, train, job)[0]]
    assert (
        len({len(h) for h, _ in outcomes[0].kept[-1]} | {len(c) for _, c in outcomes[0].kept[-1]})
        > 2
    )
    assert outcomes[1].kept == outcomes[0].kept
