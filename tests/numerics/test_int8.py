"""Int8 weights against the same model with the weights that they stand for, on 1, 2 and 3 real ZeRO-3 ranks.

Nothing has a tolerance. Both make the same operations on the same numbers.
"""

from dataclasses import replace

import pytest
import torch

from tests.numerics.driver import Job, Outcome, train, write_adapter
from tests.numerics.int8 import write_dequantised
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

STEPS = 6
SIZES = {"heads": 8, "kv_heads": 4, "head_dim": 8, "hidden": 72, "ffn": 173, "biases": True}  # 72: a short last block


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Job]:
    """A run with int8 weights, and the run that it must equal."""
    folder = tmp_path_factory.mktemp("int8")
    model = make_tiny_llama(folder / "model", layers=3, vocab=97, seed=1, dtype="bfloat16", **SIZES)
    adapter = write_adapter(folder / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=STEPS, samples=12, tokens=16, vocab=97, seed=3)
    job = Job(model, adapter, batches, {"ratio": 0.3, "prune_every": 2}, dtype="bfloat16", micro_batch_size=2)
    meant = write_dequantised(model, folder / "meant", "bfloat16")
    return replace(job, frozen="int8"), replace(job, folder=meant)


def assert_equal(found: Outcome, expected: Outcome) -> None:
    assert found.losses == expected.losses
    assert found.kept == expected.kept
    for x, y in zip(found.averages, expected.averages, strict=True):
        assert all(torch.equal(a, b) for s, t in zip(x, y, strict=True) for a, b in zip(s, t, strict=True))
    assert all(torch.equal(found.masters[name], expected.masters[name]) for name in expected.masters)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_scores_and_masks_are_those_of_the_weights_it_stands_for(
    ranks: RankPool, jobs: tuple[Job, Job], world_size: int
) -> None:
    int8, meant = (ranks.run(world_size, train, job)[0] for job in jobs)
    assert len(int8.cut_steps) >= 2
    assert_equal(int8, meant)
