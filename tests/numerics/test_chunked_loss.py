"""Logits in chunks of a few tokens, with activations computed twice, change no loss, no score and no perplexity.

Products of other heights add up in another order. The tolerance is that of test_sharded_equals_dense.py.
"""

from dataclasses import replace

import pytest
import torch

from loraprune_ds.evaluate.perplexity import fixed_batches, measure_perplexity
from tests.numerics.driver import Job, Outcome, build, run_steps, tiny_job
from tests.ranks import RankPool

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("chunks")
    prune = {"ratio": 0.2, "prune_every": 1, "warmup_fraction": 0.5, "cooldown_fraction": 0.3}
    return tiny_job(folder, prune, steps=3, model={"tie": request.param}, max_grad_norm=0.5)


def train_and_measure(job: Job) -> tuple[Outcome, float]:
    trainer = build(job)
    outcome = run_steps(trainer, job)
    engine, comm = trainer.engine.deepspeed, trainer.model.comm
    engine.eval()
    batches = fixed_batches(torch.cat([ids for ids, _ in job.batches])[:7], 2)
    measured = measure_perplexity(lambda ids, labels: engine(input_ids=ids, labels=labels), batches, comm)
    return outcome, measured.perplexity


def test_a_loss_in_chunks(ranks: RankPool, job: Job) -> None:
    whole, perplexity = ranks.run(2, train_and_measure, job)[0]
    chunked, found = ranks.run(2, train_and_measure, replace(job, loss_chunk_tokens=5, gradient_checkpointing=True))[0]
    assert whole.cut_steps
    assert chunked.kept == whole.kept
    assert chunked.losses == pytest.approx(whole.losses, abs=TOLERANCE)
    for averages, expected in zip(chunked.averages, whole.averages, strict=True):
        for ours, theirs in zip(averages, expected, strict=True):
            assert all(((a - b).abs() / b.abs()).max() < TOLERANCE for a, b in zip(ours, theirs, strict=True))
    for name, master in whole.masters.items():
        assert (chunked.masters[name] - master).abs().max() < TOLERANCE, name
    assert found == pytest.approx(perplexity, rel=TOLERANCE)
