"""A smaller shard takes the pinned block of the one before it, until a smaller block is enough."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from loraprune_ds.zero import params
from loraprune_ds.zero.params import into_pinned


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fakes the accelerator. Returns the bytes of each block that is pinned."""
    sizes: list[int] = []

    def pin_memory(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.clone()

    monkeypatch.setattr(params, "accelerator", lambda: SimpleNamespace(pin_memory=pin_memory))
    return sizes


def test_a_block_is_pinned_only_when_a_smaller_one_is_enough(pinned: list[int]) -> None:
    shard = torch.arange(100, dtype=torch.bfloat16)  # 200 bytes: a block of 256
    shards: list[Tensor] = []
    for kept in (90, 70, 65, 64, 40, 33, 32):
        cut = shard[:kept] + 1
        shard = into_pinned(shard, cut)
        assert torch.equal(shard, cut)
        shards.append(shard)  # so that no block is free again
    assert pinned == [64 * 2, 32 * 2]  # blocks of 128 and of 64
    assert len({shard.untyped_storage().data_ptr() for shard in shards}) == 3
