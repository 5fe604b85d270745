"""What makes up for removed inputs, as arithmetic on one linear (on real ranks and over steps: tests/numerics)."""

import random

import pytest
import torch
from torch import Tensor

from loraprune_ds.pruning import compensate
from loraprune_ds.pruning.compensate import (
    add_half_of_product,
    empty_half,
    from_half,
    numel_sent,
    products_of,
    refit,
)
from loraprune_ds.pruning.prunable_model import CollectedLinear
from tests.support.properties import for_any, seed
from tests.support.refusals import must_name

OUT, IN, TOKENS = 7, 12, 40


def made_up(number: int, dtype: torch.dtype = torch.float32) -> tuple[CollectedLinear, Tensor]:
    """A linear and correlated inputs (tokens, in_features)."""
    generator = torch.Generator().manual_seed(number)
    weight, a, b = (
        torch.randn(size, generator=generator) for size in ((OUT, IN), (2, IN), (OUT, 2))
    )
    inputs = torch.randn(TOKENS, 5, generator=generator) @ torch.randn(5, IN, generator=generator)
    inputs += 0.3 * torch.randn(TOKENS, IN, generator=generator) + 0.5
    return CollectedLinear({"weight": weight.to(dtype)}, None, a, b, 0.5), inputs


def output_error(linear: CollectedLinear, weight: Tensor, inputs: Tensor, kept: Tensor) -> float:
    change = linear.scaling * linear.lora_B @ linear.lora_A
    before, after = (
        inputs @ (linear.weight.float() + change).T,
        inputs[:, kept] @ (weight.float() + change)[:, kept].T,
    )
    return float((after - before).square().sum())


@for_any(60)
def test_the_output_never_gets_worse(draw: random.Random) -> None:
    linear, inputs = made_up(seed(draw))
    chosen = sorted(draw.sample(range(IN), draw.randint(1, IN - 1)))
    kept = torch.tensor(chosen)
    refitted = refit(linear, inputs.T @ inputs / TOKENS, kept, draw.choice([1e-4, 0.05, 10.0]))
    before, after = (
        output_error(linear, weight, inputs, kept) for weight in (linear.weight, refitted)
    )
    assert after < before
    removed = [i for i in range(IN) if i not in chosen]
    # they are about to go
    assert torch.equal(refitted[:, removed], linear.weight[:, removed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_does_not_make_it_worse_either(dtype: torch.dtype) -> None:
    """Rounding the weights of eight inputs with a large common part weighs more than what could be gained."""
    generator = torch.Generator().manual_seed(0)
    tokens, inputs, outputs = 2048, 256, 64
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    x[:, :8] += 30 * torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    x[:, 8] = 0.01 * (x[:, 0:8:2] - x[:, 1:8:2]).sum(1)  # the common part goes, so it is small
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    linear = CollectedLinear(
        {"weight": weight}, None, torch.zeros(2, inputs), torch.zeros(outputs, 2), 1.0
    )
    kept = torch.tensor([i for i in range(inputs) if i != 8])
    refitted = refit(linear, (x.T @ x / tokens).float(), kept, 0.05)
    before = weight.double()
    plain, now = (before @ x.T - w.double()[:, kept] @ x[:, kept].T for w in (weight, refitted))
    assert (now.square().mean(1) <= plain.square().mean(1) * (1 + 1e-6)).all()


def test_a_refit_is_in_fp32_whatever_surrounds_it() -> None:
    linear, inputs = made_up(0)
    moment, kept = inputs.T @ inputs, torch.arange(1, IN)
    expected = refit(linear, moment, kept)
    with torch.autocast("cpu", dtype=torch.bfloat16), products_of(torch.bfloat16, moment.device):
        assert torch.equal(refit(linear, moment, kept), expected)


def test_an_output_whose_refit_exceeds_fp16_keeps_its_weights() -> None:
    """No format of 8 bits could hold an infinite weight."""
    linear, inputs = made_up(0, torch.float16)
    inputs[:, 1] = inputs[:, 0] / 100  # so the weight of 1 grows by 100 times that of 0
    linear.stored["weight"][0, 0] = 1000
    kept = torch.arange(1, IN)
    refitted = refit(linear, inputs.T @ inputs, kept, 1e-9)
    assert refitted.isfinite().all()
    assert torch.equal(refitted[0], linear.weight[0])
    assert (refitted[1:, kept] != linear.weight[1:, kept]).any(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_moment_that_cannot_be_inverted_is_an_error(bad: float) -> None:
    linear, _ = made_up(3)
    must_name("moment", refit, linear, torch.full((IN, IN), bad), torch.arange(1, IN), 0.05)


# Half of a second moment is computed and sent. The owner makes the whole of it


def integers(*shape: int, seed: int) -> Tensor:
    """Returns small integers, of which fp32 adds thousands without rounding."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("n", "sent"), [(1, 1), (4, 16), (10, 40 + 24 + 4), (12, 48 + 32 + 16)])
def test_the_blocks_are_those_of_the_whole_product(
    monkeypatch: pytest.MonkeyPatch, n: int, sent: int
) -> None:
    monkeypatch.setattr(compensate, "TILE_ROWS", 4)
    first = integers(20, n, seed=1)
    second = integers(9, n, seed=2)
    half = empty_half(n, torch.device("cpu"))
    assert (len(half), numel_sent(n)) == (sent, sent)
    for x in (first, second):
        add_half_of_product(half, x)
    assert torch.equal(from_half(half, n), first.T @ first + second.T @ second)
