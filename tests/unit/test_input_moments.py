"""Half of a second moment is computed and sent. The owner has the whole. (Over steps: tests/numerics.)"""

import pytest
import torch
from torch import Tensor

from loraprune_ds.pruning import compensate
from loraprune_ds.pruning.compensate import add_half, half_of_product, numel_sent


def integers(*shape: int, seed: int) -> Tensor:
    """Returns small integers, of which fp32 adds thousands without rounding."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize(("n", "sent"), [(1, 1), (4, 16), (10, 40 + 24 + 4), (12, 48 + 32 + 16)])
def test_the_blocks_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch, n: int, sent: int) -> None:
    monkeypatch.setattr(compensate, "TILE_ROWS", 4)
    x, before = integers(20, n, seed=1), integers(n, n, seed=2)
    half, total = half_of_product(x), before.clone()
    assert (len(half), numel_sent(n)) == (sent, sent)
    add_half(total, half, 0.5)
    assert torch.equal(total, before + 0.5 * (x.T @ x))
