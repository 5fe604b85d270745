"""Plans the reshard of a layer of LLaMA-65B on up to 512 ranks, without weights."""

import pytest
import torch

from loraprune_ds.zero.flat import AxisCut, Owners, ReshardPlan, moved_elements, partition_numel

HIDDEN, FFN = 8192, 22016
LINEARS = {"q_proj": (HIDDEN, HIDDEN, 0), "o_proj": (HIDDEN, HIDDEN, 1), "down_proj": (HIDDEN, FFN, 1)}


def quarter_gone(linear: str, mask: str) -> AxisCut:
    """Cuts a quarter of the channels: any of them, or the first ones, so that all others change their place."""
    *shape, axis = LINEARS[linear]
    count = shape[axis]
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count * 3 // 4].sort().values
    return AxisCut(tuple(shape), axis, drawn if mask == "random" else torch.arange(count // 4, count))


@pytest.mark.parametrize("mask", ["random", "first"])
@pytest.mark.parametrize("linear", LINEARS)
def test_no_rank_sends_more_than_its_shard(linear: str, mask: str) -> None:
    cut = quarter_gone(linear, mask)
    for world_size in (8, 64, 512):
        sent = moved_elements(cut, world_size)
        assert sent.max() <= partition_numel(cut.shape[0] * cut.columns, world_size)


@pytest.mark.parametrize("linear", LINEARS)
def test_the_plans_of_all_ranks_fit_together(linear: str) -> None:
    cut, world_size = quarter_gone(linear, "random"), 64
    owners, ranks = Owners(cut, world_size), torch.arange(world_size)
    sends, receives = owners.sent_by(ranks), owners.received_by(ranks)
    assert torch.equal(sends, receives.T)
    assert torch.equal(receives.sum(1), owners.new.diff())
    assert torch.equal(sends.sum(1) - sends.diagonal(), moved_elements(cut, world_size))
    for rank in (0, 1, 31, 63):
        plan = ReshardPlan(cut, world_size, rank)
        for given, counts in ((plan.send, sends[rank]), (plan.receive, receives[rank])):
            assert [given.get(other, 0) for other in range(world_size)] == counts.tolist()
