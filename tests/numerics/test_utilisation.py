"""The MFU of a step counts the tokens of all ranks over what all their GPUs could do."""

from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.model.flops import needed_flops_per_token
from tests.numerics.driver import Job, build, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

PEAK = 1e9  # operations per second of a made-up card
SAMPLES, WINDOW = 8, 12


def utilisation(job: Job) -> tuple[float, float]:
    """Returns a step's MFU and what the arithmetic of its whole batch comes to."""
    trainer = build(job)
    trainer._peak_flops = PEAK
    shape = trainer.model.shape
    record = trainer.step(1)
    needed = SAMPLES * WINDOW * needed_flops_per_token(shape, WINDOW)
    assert record.mfu is not None
    return record.mfu, needed / record.seconds / (PEAK * trainer.model.world_size)


def test_all_tokens_count_over_all_cards(ranks: RankPool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "ffn": 40}
    model = make_tiny_llama(tmp_path / "model", layers=3, vocab=97, seed=1, **sizes)
    adapter = write_adapter(tmp_path / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=1, samples=SAMPLES, tokens=WINDOW, vocab=97, seed=3)
    prune = {"ratio": 0.2, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    for mfu, expected in ranks.run(2, utilisation, Job(model, adapter, batches, prune, micro_batch_size=2)):
        assert mfu == pytest.approx(expected)
