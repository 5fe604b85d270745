"""Where parameters and buffers lie: on the device from birth, or in the pinned block of a larger shard."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.zero import params
from loraprune_ds.zero.params import into_pinned, shard_at_birth


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


def test_buffers_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotary embedding has no parameters. On the host its frequencies would be copied in each pass."""

    class FakeInit(nullcontext[None]):
        local_device = torch.device("meta")

    monkeypatch.setattr(params, "Init", lambda **settings: FakeInit())
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[1].register_buffer("inv_freq", torch.ones(4), persistent=False)
    model[1].register_buffer("none", None)

    def read(name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        raise AssertionError("there is no parameter")

    shard_at_birth(model, read, ds_config={}, dtype=torch.bfloat16, world_size=2, rank=0)
    assert model[1].inv_freq.is_meta
    assert "inv_freq" not in model.state_dict()
    assert model[1].none is None
