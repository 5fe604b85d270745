"""Half of a second moment is computed and sent. The owner has the whole."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.pruning import input_moments, taps
from loraprune_ds.pruning.input_moments import InputMoments, add_half, half_of_product, numel_sent
from tests.unit.shapes_and_scores import make_shape


def integers(*shape: int, seed: int) -> Tensor:
    """Returns small integers, of which fp32 adds thousands without rounding."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("n", "sent"), [(1, 1), (4, 16), (10, 40 + 24 + 4), (12, 48 + 32 + 16)])
def test_the_blocks_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch, n: int, sent: int) -> None:
    monkeypatch.setattr(input_moments, "BLOCK", 4)
    x, before = integers(20, n, seed=1), integers(n, n, seed=2)
    half, total = half_of_product(x), before.clone()
    assert (len(half), numel_sent(n)) == (sent, sent)
    add_half(total, half, 0.5)
    assert torch.equal(total, before + 0.5 * (x.T @ x))


def test_little_more_than_half_is_sent_of_wide_moments() -> None:
    assert 0.5 < numel_sent(22016) / 22016**2 < 0.53


def test_sums_move_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_moments, "BLOCK", 3)
    monkeypatch.setattr(taps, "lora_linear", lambda layer, linear: nn.Identity())
    shape = make_shape([(1, 4)])
    model: Any = SimpleNamespace(
        layers=[None],
        shape=shape,
        device="cpu",
        owner=lambda layer: 0,
        reduce_to=lambda owner, part: part,
        sum_over_ranks=lambda values: values,
    )
    moments = InputMoments(model, [0], decay=0.5)
    linear_id = shape.input_linear_ids()[0]
    steps = [[integers(2, 5, 8, seed=s), integers(2, 5, 8, seed=s + 10)] for s in (1, 2, 3)]
    expected, tokens = torch.zeros(8, 8), 0.0
    for number, micro_batches in enumerate(steps):
        weight, decay = (1.0, 0.0) if number == 0 else (0.5, 0.5)
        with moments.record_step():
            for inputs in micro_batches:
                with moments.record_forward(None):
                    moments._record(linear_id, inputs)
        rows = torch.cat(micro_batches).flatten(0, 1)
        expected = decay * expected + weight * (rows.T @ rows)
        tokens = decay * tokens + weight * len(rows)
    assert torch.equal(moments.sums[linear_id], expected)
    assert moments.tokens == tokens
