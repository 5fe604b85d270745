"""Scores by `fisher` in one process, against an explicit mask in the same network."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.criterion import mask_gradients, sum_of_squares
from tests.oracle.formula import mask_fisher
from tests.oracle.models import make_batches
from tests.support.driver import random_lora
from tests.support.families import SIZES, tiny_model
from tests.support.mask_gradient_settings import PRUNE
from tests.support.plain_training import Batch, PlainRun

# Both sides are in fp64, but norms, rotary angles and some softmaxes are in fp32. The package sums in fp32.
TOLERANCE = 1e-5
QUERY_HEADS = {"gemma": (5, 1), "glm4": (10, 2)}  # of all key-value heads, and these


def tiny_run(folder: Path, family: str, **settings: Any) -> tuple[PlainRun, Batch]:
    """Returns a run of one step in micro-batches of 2 samples, and its batch of 6."""
    tiny_model(family, seed=1).save_pretrained(folder)
    run = PlainRun(
        folder, random_lora(folder), PRUNE, 10, dtype=torch.float64, micro_batch_size=2, **settings
    )
    (batch,) = make_batches(steps=1, samples=6, tokens=12, vocab=SIZES["vocab_size"], seed=3)
    return run, batch


def masked_scores(run: PlainRun, batch: Batch, heads: int = 5, ranges: int = 0) -> list[Tensor]:
    """Returns the oracle's scores: heads, then channels, layer by layer."""
    masked: list[tuple[nn.Module, int, int]] = []
    for i, layer in enumerate(run.prunable.layers):
        attention, mlp = (
            layer.get_submodule(x.linear) for _, x in run.prunable.shape.input_linears([i])
        )
        masked += [(attention, heads, ranges), (mlp, SIZES["intermediate_size"], 0)]
    wanted = batch[1][:, 1:].flatten()

    def loss() -> Tensor:
        return cross_entropy(run.model(input_ids=batch[0]).logits[:, :-1].flatten(0, 1), wanted)

    return mask_fisher(loss, masked)


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float(((found - expected).abs() / expected.abs().max()).max())


# fused; four norms, softcap; no gate; one and two key-value heads
@pytest.mark.parametrize("family", ["phi3", "gemma2", "starcoder2", *QUERY_HEADS])
def test_scores_are_those_of_an_explicit_mask(tmp_path: Path, family: str) -> None:
    run, batch = tiny_run(tmp_path, family)
    expected = masked_scores(run, batch, *QUERY_HEADS.get(family, ()))
    run.step(1, batch)
    found = [scores for pair in run.averages[0] for scores in pair]
    assert all(relative(a, b) < TOLERANCE for a, b in zip(found, expected, strict=True))


def test_the_loss_scale_leaves_no_trace_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, batch = tiny_run(tmp_path, "llama")
    monkeypatch.setattr(type(run.prunable), "loss_scale", 1024.0)
    run.prunable.world_size = 4
    masks = run.pruner.mask_gradients
    assert isinstance(masks, criterion.MaskGradients)
    plain = masked_scores(run, batch)
    with run.pruner.record_step(1):
        supervised = int((batch[1][:, 1:] != -100).sum())
        for ids, labels in zip(*(t.split(3) for t in batch), strict=True):
            logits = run.model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / supervised
            cast(Any, loss * 4096).backward()
        assert all(relative(a, b) < TOLERANCE for a, b in zip(masks.sums(), plain, strict=True))
    assert not masks._squares
    run.backward(batch)  # no step is open
    assert not masks._squares


def test_any_block_of_tokens_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(3, 7, 12, generator=generator).bfloat16() for _ in range(2))
    exact = (x.double() * g.double()).view(21, 4, 3).sum(2).square().sum(0)
    for block in (1, 30, 12 * 21):
        monkeypatch.setattr(criterion, "CPU_INPUTS", block)
        found = sum_of_squares(mask_gradients(x, g, 3))
        assert found.dtype == torch.float32
        # products are exact in fp32, sums of 21 terms are not
        assert relative(found.double(), exact) < 1e-6
