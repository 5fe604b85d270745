"""A tiny LLaMA in the clothes of other families is pruned as the LLaMA is: the same bits, or the same groups.

tests/benchmarks/clothes.py does this with a real network, whole runs and ZeRO-3 ranks.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import Criterion, PruneConfig
from tests.clothes import rewrite
from tests.numerics.test_families import random_lora
from tests.oracle.models import make_batches, make_tiny_llama
from tests.unit.plain_training import PlainRun

STEPS, VOCAB = 4, 97


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a LLaMA with grouped queries. Its head_dim is hidden_size / heads, as Phi-3's must be."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_llama(folder, heads=10, kv_heads=5, head_dim=6, hidden=60, ffn=23, layers=2, vocab=VOCAB, seed=1)
    return folder


def lora_of(folder: Path, criterion: Criterion) -> dict[str, Tensor]:
    """Draws an adapter. That of `magnitude` adds nothing."""
    lora = random_lora(folder)
    return {name: factor * (criterion == "lora") for name, factor in lora.items()}


def pruned(folder: Path, criterion: Criterion, learning_rate: float = 5e-3) -> PlainRun:
    batches = make_batches(steps=STEPS, samples=6, tokens=16, vocab=VOCAB, seed=3)
    prune = PruneConfig(
        criterion=criterion, ratio=0.4, prune_every=2, protected_first=0, protected_last=0, channel_multiple=1
    )
    run = PlainRun(folder, lora_of(folder, criterion), prune, STEPS, learning_rate=learning_rate).run(batches)
    assert len(run.cuts) >= 2
    return run


@pytest.mark.parametrize("family", ["mistral", "qwen2", "granite"])
def test_all_is_the_same_to_the_bit(family: str, llama: Path, tmp_path: Path) -> None:
    wanted, found = pruned(llama, "lora"), pruned(rewrite(llama, family, tmp_path / family), "lora")
    assert found.losses == wanted.losses
    assert found.kept() == wanted.kept()
    tensors = found.tensors()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in wanted.tensors().items())


def test_a_fused_model_loses_the_same_groups(llama: Path, tmp_path: Path) -> None:
    """Holds for the size of the frozen weights. Each fused part is normalised on its own."""
    fused = pruned(rewrite(llama, "phi3", tmp_path / "phi3"), "magnitude", learning_rate=0.0)
    assert fused.kept() == pruned(llama, "magnitude", learning_rate=0.0).kept()
