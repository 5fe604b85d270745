"""transformers' Trainer with the callback against the package's own trainer: same data, seed and schedule."""

from pathlib import Path

import pytest

from tests.hf.trainers import train_alone, train_with_callback
from tests.numerics.driver import Job, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

PRUNE = {"ratio": 0.4, "prune_every": 3}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny_llama(
        folder / "model", heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=160, layers=4, vocab=97, seed=1
    )
    adapter = write_adapter(folder / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=10, samples=8, tokens=16, vocab=97, seed=3)
    return Job(model, adapter, batches, PRUNE, max_grad_norm=0.5)


def test_the_callback_cuts_as_our_own_trainer(ranks: RankPool, job: Job, tmp_path: Path) -> None:
    own, foreign = ranks.run(2, train_alone, job)[0], ranks.run(2, train_with_callback, job, tmp_path)[0]
    for step, (ours, theirs) in enumerate(zip(own, foreign, strict=True), start=1):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6), step
        assert theirs["norm"] == pytest.approx(ours["norm"], rel=1e-6), step
        assert theirs["kept"] == ours["kept"], step
