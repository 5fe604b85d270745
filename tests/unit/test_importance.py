"""Scores of elements against the oracle, from weights split over simulated ranks. Scores of groups, step after step."""

import random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from loraprune_ds.config_types import Normalization
from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard
from loraprune_ds.pruning.importance import GroupSums, MovingAverage
from loraprune_ds.pruning.layer_scores import random_scores
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from loraprune_ds.ranks.flat import partition_numel
from loraprune_ds.zero.params import owned_flat
from tests.oracle import formula
from tests.support.properties import for_any, seed
from tests.support.shapes_and_scores import make_shape

# Elements

# relative to the largest sum: fp32 products of up to 23 terms whose parts cancel, summed in fp64
FP32 = 1e-5


def owned_shard(weight: Tensor, world_size: int, rank: int) -> OwnedShard:
    """What `rank` owns of a weight, as the package reads it from a ZeRO-3 parameter. Padding is poisoned with NaN."""
    size = partition_numel(weight.numel(), world_size)
    padded = torch.cat(
        [weight.reshape(-1), weight.new_full((size * world_size - weight.numel(),), float("nan"))]
    )
    parameter: Any = torch.empty(0)
    parameter.ds_numel, parameter.ds_tensor = (
        weight.numel(),
        padded[rank * size : (rank + 1) * size],
    )
    flat, start = owned_flat(parameter, world_size, rank)
    return OwnedShard(flat, start, (weight.shape[0], weight.shape[1]))


def random_linear(
    generator: torch.Generator,
    shape: tuple[int, int],
    r: int,
    scaling: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, LoraFactors]:
    """Returns a weight and its LoRA."""
    rows, columns = shape
    sizes = ((rows, columns), (r, columns), (rows, r), (r, columns), (rows, r))
    weight, *factors = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return weight, LoraFactors(*factors, scaling=scaling)


def oracle(name: str, weight: Tensor, factors: LoraFactors) -> Tensor:
    weight, a, b = weight.double(), factors.A.double(), factors.B.double()
    if name == "lora":
        gradients = factors.grad_A.double(), factors.grad_B.double()
        return formula.element_importance(weight, a, b, *gradients, factors.scaling)
    return (weight + factors.scaling * b @ a).abs()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= FP32 * expected.abs().max())


@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.5])
@pytest.mark.parametrize("name", ELEMENT_CRITERIA)
def test_criteria_are_the_oracles_in_fp64(name: str, scaling: float) -> None:
    for shape, r in (((9, 6), 3), ((3, 11), 4), ((1, 1), 2)):
        weight, factors = random_linear(
            torch.Generator().manual_seed(1), shape, r, scaling, torch.float64
        )
        found = ELEMENT_CRITERIA[name](weight, factors, None).abs()
        torch.testing.assert_close(found, oracle(name, weight, factors), rtol=1e-12, atol=1e-12)


@for_any(500)
def test_partial_sums_add_up_to_the_sums_of_the_whole_weight(draw: random.Random) -> None:
    shape, world_size = (draw.randint(1, 23), draw.randint(1, 23)), draw.randint(1, 9)
    generator = torch.Generator().manual_seed(seed(draw))
    weight, factors = random_linear(generator, shape, draw.randint(1, 4), draw.choice([0.5, 2.0]))
    axis, name = draw.randint(0, 1), draw.choice(["lora", "magnitude"])
    total = torch.zeros(shape[axis], dtype=torch.float64)
    with patch.object(criterion, "CPU_BLOCK_NUMEL", draw.choice([1, 7, 64, 1 << 17])):
        for rank in range(world_size):
            shard = owned_shard(weight, world_size, rank)
            score_shard(total, shard, factors, ELEMENT_CRITERIA[name], axis)
    assert close(total, oracle(name, weight, factors).sum(1 - axis))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_scored_in_fp32_and_left_alone(dtype: torch.dtype) -> None:
    weight, factors = random_linear(torch.Generator().manual_seed(2), (12, 9), 2, 2.0)
    weight = weight.to(dtype)
    given = (weight, factors.A, factors.B, factors.grad_A, factors.grad_B)
    before = [t.clone() for t in given]
    for name, element in ELEMENT_CRITERIA.items():
        shard = owned_shard(weight, 1, 0)
        flat = shard.flat.clone()
        sums = torch.zeros(9, dtype=torch.float64)
        score_shard(sums, shard, factors, element, 1)
        assert torch.equal(shard.flat, flat), name
        assert close(sums, oracle(name, weight, factors).sum(0)), name
        assert all(torch.equal(b, a) for b, a in zip(before, given, strict=True)), name


# Scores of groups. tests/numerics/test_cutting.py has the oracle's, on real ranks

SHAPE = make_shape([(3, 17), (1, 1), (2, 30)], hidden=11, head_dim=2, queries_per_group=2)


def made_up(generator: torch.Generator, factor: float) -> GroupSums:
    """Returns a step whose first linear has no score."""
    linears = list(SHAPE.linears())
    sizes = [linear.spans[0].size // linear.spans[0].width for _, linear in linears]
    parts = [factor * torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]
    return GroupSums(SHAPE, linears, [0 * parts[0], *parts[1:]], step=1)


def added(sums: GroupSums, normalization: Normalization) -> list[dict[str, Tensor]]:
    """Adds up the scores of a layer's linears."""
    layers = [
        {kind: torch.zeros(n).double() for kind, n in layer.items()} for layer in SHAPE.counts
    ]
    total = float(torch.cat([*sums.of_spans]).sum())
    for (layer, linear), scores in zip(sums.linears, sums.of_spans, strict=True):
        divisor = {"l2": float(scores.norm()), "step": total, "none": 1.0}[normalization] or 1.0
        layers[layer][linear.spans[0].kind] += scores / divisor
    return layers


@pytest.mark.parametrize("normalization", ["l2", "step", "none"])
@pytest.mark.parametrize("factor", [1.0, 50.0, 0.0])
def test_scores_of_a_layer_are_those_of_its_linears(
    normalization: Normalization, factor: float
) -> None:
    """By `step` each step counts alike, though the gradients of one are larger, or zero."""
    average, generator = MovingAverage(0.9), torch.Generator().manual_seed(0)
    steps = [made_up(generator, 1.0), made_up(generator, factor)]
    for sums in steps:
        average.update(sums.by_layer(normalization))
    for found, *of_steps in zip(
        average.scores or [], *(added(sums, normalization) for sums in steps), strict=True
    ):
        for kind, scores in found.items():
            first, second = (layer[kind] for layer in of_steps)
            # fp64
            torch.testing.assert_close(scores, 0.09 * first + 0.1 * second, rtol=1e-12, atol=1e-12)


def test_random_scores_are_one_draw_per_group() -> None:
    shape = make_shape([(4, 30), (4, 30), (2, 5)])
    first, again, other = random_scores(shape, 1), random_scores(shape, 1), random_scores(shape, 2)
    assert [(len(s["heads"]), len(s["channels"])) for s in first] == [(4, 30), (4, 30), (2, 5)]
    assert all(
        torch.equal(a[k], b[k])
        for a, b in zip(first, again, strict=True)
        for k in ("heads", "channels")
    )
    assert not torch.equal(first[0]["channels"], other[0]["channels"])
    assert not torch.equal(first[0]["channels"], first[1]["channels"])  # layers draw their own
