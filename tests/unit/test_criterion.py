"""Element importance against the oracle, and its sums over any split of a weight into flat shards."""

import random

import pytest
import torch
from torch import Tensor

from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard
from loraprune_ds.pruning.prunable_model import LoraFactors
from tests.oracle import formula
from tests.unit.split_model import owned_shard

FP32 = 1e-5  # relative to the largest sum: fp32 products of up to 23 terms whose parts cancel, summed in fp64


def random_linear(
    generator: torch.Generator, shape: tuple[int, int], r: int, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LoraFactors, Tensor]:
    """Returns a weight, its LoRA, and the gradient of the weight."""
    rows, columns = shape
    sizes = ((rows, columns), (r, columns), (rows, r), (r, columns), (rows, r), (rows, columns))
    weight, *factors, gradient = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return weight, LoraFactors(*factors, scaling=scaling), gradient


def oracle(name: str, weight: Tensor, factors: LoraFactors, gradient: Tensor) -> Tensor:
    weight, a, b = weight.double(), factors.A.double(), factors.B.double()
    if name in ("lora", "lora_squared"):
        gradients = factors.grad_A.double(), factors.grad_B.double()
        return formula.element_importance(weight, a, b, *gradients, factors.scaling, 2 if name == "lora_squared" else 1)
    return ((gradient.double() if name == "gradient" else 1) * (weight + factors.scaling * b @ a)).abs()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= FP32 * expected.abs().max())


@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.5])
@pytest.mark.parametrize("name", ELEMENT_CRITERIA)
def test_criteria_are_the_oracles_in_fp64(name: str, scaling: float) -> None:
    for shape, r in (((9, 6), 3), ((3, 11), 4), ((1, 1), 2)):
        weight, factors, gradient = random_linear(torch.Generator().manual_seed(1), shape, r, scaling, torch.float64)
        given = (gradient,) if name == "gradient" else ()
        found = ELEMENT_CRITERIA[name](weight.clone(), factors, *given).abs()
        torch.testing.assert_close(found, oracle(name, weight, factors, gradient), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 17])
def test_partial_sums_add_up_to_the_sums_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(criterion, "CPU_BLOCK_NUMEL", block)
    draw, generator = random.Random(block), torch.Generator().manual_seed(block)
    for _ in range(1000):
        shape, r, world_size = (draw.randint(1, 23), draw.randint(1, 23)), draw.randint(1, 4), draw.randint(1, 9)
        weight, factors, gradient = random_linear(generator, shape, r, draw.choice([0.5, 1.0, 2.0]))
        axis, name = draw.randint(0, 1), draw.choice(["lora", "lora_squared", "gradient"])
        total = torch.zeros(shape[axis], dtype=torch.float64)
        for rank in range(world_size):
            shard, of_gradient = (owned_shard(w, world_size, rank) for w in (weight, gradient))
            given = of_gradient.flat if name == "gradient" else None
            part = score_shard(shard, factors, ELEMENT_CRITERIA[name], axis, given)
            assert (part.dtype, part.shape) == (torch.float64, total.shape)
            total += part
        assert close(total, oracle(name, weight, factors, gradient).sum(1 - axis)), (shape, world_size, axis, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_scored_in_fp32_and_left_alone(dtype: torch.dtype) -> None:
    weight, factors, gradient = random_linear(torch.Generator().manual_seed(2), (12, 9), 2, 2.0)
    weight = weight.to(dtype)
    given = (weight, gradient, factors.A, factors.B, factors.grad_A, factors.grad_B)
    before = [t.clone() for t in given]
    for name, element in ELEMENT_CRITERIA.items():
        of_gradient = gradient.view(-1) if name == "gradient" else None
        shard = owned_shard(weight, 1, 0)
        flat = shard.flat.clone()
        sums = score_shard(shard, factors, element, 1, of_gradient)
        assert torch.equal(shard.flat, flat), name
        assert close(sums, oracle(name, weight, factors, gradient).sum(0)), name
        assert all(torch.equal(b, a) for b, a in zip(before, given, strict=True)), name
