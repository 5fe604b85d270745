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


def fresh_lora(folder: Path) -> dict[str, Tensor]:
    """Draws an adapter as training begins with, B zero. The parts that phi3 fuses have the same A."""
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "qkv_proj": "q_proj", "up_proj": "gate_proj"}
    first["gate_up_proj"] = "gate_proj"
    lora: dict[str, Tensor] = {}
    for name, factor in random_lora(folder).items():
        *path, linear, side = name.split(".")
        seed = sum(map(ord, ".".join((*path, first.get(linear, linear)))))
        drawn = torch.randn(factor.shape, generator=torch.Generator().manual_seed(seed))
        lora[name] = drawn if side == "lora_A" else torch.zeros_like(factor)
    return lora


def pruned(
    folder: Path, criterion: Criterion, learning_rate: float = 5e-3, lora: dict[str, Tensor] | None = None
) -> PlainRun:
    batches = make_batches(steps=STEPS, samples=6, tokens=16, vocab=VOCAB, seed=3)
    prune = PruneConfig(
        criterion=criterion, ratio=0.4, prune_every=2, protected_first=0, protected_last=0, channel_multiple=1
    )
    lora = lora or lora_of(folder, criterion)
    run = PlainRun(folder, lora, prune, STEPS, learning_rate=learning_rate, dtype=torch.float64).run(batches)
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


def test_a_fused_model_with_the_same_lora_loses_the_same_groups(llama: Path, tmp_path: Path) -> None:
    """Its q, k and v share one A, as do gate and up. If a LLaMA has the same A everywhere, its scores are the same."""
    fused = rewrite(llama, "phi3", tmp_path / "phi3")
    runs = [pruned(folder, "lora", learning_rate=0.0, lora=fresh_lora(folder)) for folder in (llama, fused)]
    assert runs[0].kept() == runs[1].kept()
    for wanted, found in zip(runs[0].averages[0], runs[1].averages[0], strict=True):
        for kind in (0, 1):
            torch.testing.assert_close(found[kind], wanted[kind], rtol=1e-9, atol=0)  # fp64, other kernels
