"""Element importance against the oracle, and its sums over any split of a weight into flat shards."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, effective_weight, gradient_estimate, score_shard
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from tests.oracle import formula
from tests.unit.split_model import owned_shard

FP32 = 1e-5  # relative to the largest sum: fp32 products of up to 23 terms whose parts cancel, summed in fp64
Score = Callable[..., Tensor]


def random_linear(
    generator: torch.Generator, shape: tuple[int, int], r: int, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LoraFactors]:
    rows, columns = shape
    sizes = ((rows, columns), (r, columns), (rows, r), (r, columns), (rows, r))
    weight, *factors = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return weight, LoraFactors(*factors, scaling=scaling)


def oracle_importance(weight: Tensor, factors: LoraFactors, power: int = 1) -> Tensor:
    tensors = (weight, factors.A, factors.B, factors.grad_A, factors.grad_B)
    return formula.element_importance(*tensors, factors.scaling, power)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= FP32 * expected.abs().max())


# The elements


def test_estimate_is_the_oracles_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, r in (((7, 5), 1), ((3, 11), 4), ((1, 1), 2)):
        _, f = random_linear(generator, shape, r, 2.0, torch.float64)
        expected = formula.gradient_estimate(f.A, f.B, f.grad_A, f.grad_B)
        torch.testing.assert_close(gradient_estimate(f), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 7.5])
def test_criteria_are_the_oracles_in_fp64(scaling: float) -> None:
    weight, factors = random_linear(torch.Generator().manual_seed(1), (9, 6), 3, scaling, torch.float64)
    weight_gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=weight.dtype)
    expected = {
        "lora": oracle_importance(weight, factors),
        "lora_squared": oracle_importance(weight, factors, power=2),
        "gradient": (weight_gradient * (weight + scaling * factors.B @ factors.A)).abs(),
        "magnitude": (weight + scaling * factors.B @ factors.A).abs(),
    }
    assert set(expected) == set(ELEMENT_CRITERIA)
    for name, importance in expected.items():
        given = (weight_gradient,) if name == "gradient" else ()
        found = ELEMENT_CRITERIA[name](weight.clone(), factors, *given).abs()
        torch.testing.assert_close(found, importance, rtol=1e-12, atol=1e-12)


def no_scaling(weight: Tensor, factors: LoraFactors) -> Tensor:
    return gradient_estimate(factors) * effective_weight(weight, replace(factors, scaling=1.0))


def no_adapter_in_the_weight(weight: Tensor, factors: LoraFactors) -> Tensor:
    return gradient_estimate(factors) * weight


def no_quadratic_term(weight: Tensor, factors: LoraFactors) -> Tensor:
    return (factors.grad_B @ factors.A + factors.B @ factors.grad_A) * effective_weight(weight, factors)


def plus_quadratic_term(weight: Tensor, factors: LoraFactors) -> Tensor:
    estimate = factors.grad_B @ (factors.A + factors.grad_A) + factors.B @ factors.grad_A
    return estimate * effective_weight(weight, factors)


def scaled_estimate(weight: Tensor, factors: LoraFactors) -> Tensor:
    return factors.scaling * gradient_estimate(factors) * effective_weight(weight, factors)


def gradient_of_one_factor(weight: Tensor, factors: LoraFactors) -> Tensor:
    return factors.grad_B @ factors.A * effective_weight(weight, factors)


@pytest.mark.parametrize(
    "wrong",
    [
        no_scaling,
        no_adapter_in_the_weight,
        no_quadratic_term,
        plus_quadratic_term,
        scaled_estimate,
        gradient_of_one_factor,
    ],
)
def test_a_wrong_formula_is_caught(monkeypatch: pytest.MonkeyPatch, wrong: criterion.ElementCriterion) -> None:
    monkeypatch.setitem(ELEMENT_CRITERIA, "lora", wrong)
    with pytest.raises(AssertionError):
        test_criteria_are_the_oracles_in_fp64(2.0)
    with pytest.raises(AssertionError):
        check_splits(random.Random(0), cases=10)


# Their sums over the shards that ranks own


def check_splits(draw: random.Random, cases: int, score: Score = score_shard) -> None:
    """Over any split of the weight the partial sums add up to those of the whole."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    for _ in range(cases):
        shape, r, world_size = (draw.randint(1, 23), draw.randint(1, 23)), draw.randint(1, 4), draw.randint(1, 9)
        weight, factors = random_linear(generator, shape, r, draw.choice([0.5, 1.0, 2.0]))
        axis, power = draw.randint(0, 1), draw.choice([1, 2])
        element = ELEMENT_CRITERIA["lora" if power == 1 else "lora_squared"]
        expected = oracle_importance(weight, factors, power).sum(1 - axis)
        shards = [owned_shard(weight, world_size, rank) for rank in range(world_size)]
        sums = [score(shard, factors, element, axis) for shard in shards]
        assert all(p.dtype == torch.float64 and p.shape == (shape[axis],) for p in sums)
        for shard, part in zip(shards, sums, strict=True):
            assert shard.flat.numel() or not part.any()
        total = torch.stack(sums).sum(0)
        assert close(total, expected), (shape, world_size, axis)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 17])
def test_partial_sums_add_up_to_those_of_the_whole(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(criterion, "CPU_BLOCK_NUMEL", block)
    check_splits(random.Random(block), cases=1000)


def test_a_gpu_gets_few_large_blocks() -> None:
    """down_proj of LLaMA-7B on one of 8 ranks, on a device without memory: 5.6 M elements."""
    out_features, in_features, r = 4096, 11008, 8
    a, b = (torch.empty(shape, device="meta") for shape in ((r, in_features), (out_features, r)))
    numel = out_features * in_features // 8
    shard = OwnedShard(torch.empty(numel, dtype=torch.bfloat16, device="meta"), 3 * numel, (out_features, in_features))
    blocks = []

    def count(weight: Tensor, factors: LoraFactors) -> Tensor:
        blocks.append(weight.numel())
        return ELEMENT_CRITERIA["lora"](weight, factors)

    assert score_shard(shard, LoraFactors(a, b, a, b, 2.0), count, 1).shape == (in_features,)
    assert blocks == [numel]


@pytest.mark.parametrize("block", [7, 1 << 17])
def test_weight_gradients_are_scored_shard_by_shard(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(criterion, "CPU_BLOCK_NUMEL", block)
    draw, generator = random.Random(block), torch.Generator().manual_seed(block)
    for _ in range(300):
        shape, world_size, axis = (draw.randint(1, 23), draw.randint(1, 23)), draw.randint(1, 9), draw.randint(0, 1)
        weight, factors = random_linear(generator, shape, 2, 2.0)
        gradient = torch.randn(shape, generator=generator)
        expected = (gradient.double() * (weight.double() + 2 * factors.B.double() @ factors.A.double())).abs()
        split = [[owned_shard(w, world_size, r) for w in (weight, gradient)] for r in range(world_size)]
        sums = [score_shard(w, factors, ELEMENT_CRITERIA["gradient"], axis, g.flat) for w, g in split]
        assert close(torch.stack(sums).sum(0), expected.sum(1 - axis)), (shape, world_size, axis)


def score_naively(
    shard: OwnedShard,
    factors: LoraFactors,
    element: criterion.ElementCriterion,
    axis: int,
    *,
    trim: bool = True,
    absolute: bool = True,
) -> Tensor:
    """Scores the whole weight with zeros in place of what others own."""
    end = shard.start + len(shard.flat)
    padded, owned = torch.zeros(shard.shape), torch.zeros(shard.shape, dtype=torch.bool)
    padded.view(-1)[shard.start : end] = shard.flat
    owned.view(-1)[shard.start : end] = True
    if not trim:
        owned |= owned.any(1, keepdim=True)
    importance = element(padded, factors) * owned
    return (importance.abs() if absolute else importance).double().sum(1 - axis)


@pytest.mark.parametrize("wrong", [{"trim": False}, {"absolute": False}], ids=str)
def test_a_wrong_sum_is_caught(wrong: dict[str, bool]) -> None:
    """Rows that two ranks share counted whole by both; elements of opposite sign that cancel."""
    check_splits(random.Random(0), cases=30, score=score_naively)
    with pytest.raises(AssertionError):
        check_splits(random.Random(0), cases=30, score=partial(score_naively, **wrong))


def test_scoring_leaves_its_input_alone() -> None:
    weight, factors = random_linear(torch.Generator().manual_seed(2), (6, 5), 2, 2.0)
    shard = owned_shard(weight, 1, 0)
    given = (shard.flat, weight, factors.A, factors.B, factors.grad_A, factors.grad_B)
    before = [t.clone() for t in given]
    for name, element in ELEMENT_CRITERIA.items():
        score_shard(shard, factors, element, 0, *([weight.view(-1)] if name == "gradient" else []))
        assert all(torch.equal(b, a) for b, a in zip(before, given, strict=True)), name


def test_bf16_weights_are_scored_in_fp32() -> None:
    weight, factors = random_linear(torch.Generator().manual_seed(3), (12, 9), 2, 2.0)
    weight = weight.bfloat16()
    sums = score_shard(owned_shard(weight, 1, 0), factors, ELEMENT_CRITERIA["lora"], 1)
    assert close(sums, oracle_importance(weight, factors).sum(0))
