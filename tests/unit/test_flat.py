"""The geometry of a cut on flat shards, with every rank simulated. All plans together are an index_select."""

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.ranks.flat import AxisCut, ReshardPlan, owned_range, partition_numel
from loraprune_ds.zero.cut import reshard
from tests.support.properties import for_any
from tests.support.zero_bytes import elements_sent


@dataclass(frozen=True)
class Case:
    unpruned: Tensor  # every element is its flat position
    cut: AxisCut
    world_size: int

    def shards(self) -> list[Tensor]:
        """Returns each rank's shard. All have equal lengths, and the padding is poisoned."""
        size = partition_numel(self.unpruned.numel(), self.world_size)
        padding = self.unpruned.new_full(
            (size * self.world_size - self.unpruned.numel(),), math.nan
        )
        return list(torch.cat([self.unpruned.reshape(-1), padding]).split(size))

    def plans(self) -> list[ReshardPlan]:
        return [ReshardPlan(self.cut, self.world_size, rank) for rank in range(self.world_size)]

    def left(self) -> Tensor:
        return self.unpruned.index_select(self.cut.axis, self.cut.keep)

    def owners(self, numel: int) -> Tensor:
        return torch.arange(numel) // partition_numel(numel, self.world_size)


def random_case(draw: random.Random) -> Case:
    shape = (
        (draw.randint(1, 23),)
        if draw.random() < 0.15
        else (draw.randint(1, 23), draw.randint(1, 23))
    )
    axis = draw.randrange(len(shape))
    keep = torch.tensor(sorted(draw.sample(range(shape[axis]), draw.randint(1, shape[axis]))))
    unpruned = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    return Case(unpruned, AxisCut(shape, axis, keep), draw.randint(1, 9))


def exchange(case: Case, plans: list[ReshardPlan]) -> list[Tensor]:
    """Returns the new shards, as an all-to-all would deliver them."""
    empty = case.unpruned.reshape(-1)[:0]
    taken = (
        plan.take(x).split(list(plan.send.values()))
        for plan, x in zip(plans, case.shards(), strict=True)
    )
    outgoing = [
        dict(zip(plan.send, parts, strict=True)) for plan, parts in zip(plans, taken, strict=True)
    ]
    return [
        torch.cat([parts.get(rank, empty) for parts in outgoing]) for rank in range(case.world_size)
    ]


@for_any(500)
def test_all_ranks_together_select_the_kept_elements(draw: random.Random) -> None:
    case = random_case(draw)
    plans, left = case.plans(), case.left()
    for sender, plan in enumerate(plans):
        arrives = {
            rank: other.receive[sender]
            for rank, other in enumerate(plans)
            if sender in other.receive
        }
        assert plan.send == arrives
        assert all(plan.send.values())
    shards = exchange(case, plans)
    for rank, (plan, shard) in enumerate(zip(plans, shards, strict=True)):
        start, end = owned_range(left.numel(), case.world_size, rank)
        assert len(shard) == sum(plan.receive.values()) == end - start <= plan.new_partition
        # the last ones may own only padding
        assert torch.equal(shard, left.reshape(-1)[start:end]), (case, rank)
    assert sum(map(len, shards)) == left.numel()
    assert case.cut.new_shape == left.shape
    old_owner, new_owner = (
        case.owners(case.unpruned.numel())[left.reshape(-1).long()],
        case.owners(left.numel()),
    )
    moved = old_owner[old_owner != new_owner].bincount(minlength=case.world_size)
    assert [
        elements_sent(case.cut, case.world_size, rank) for rank in range(case.world_size)
    ] == moved.tolist()


@pytest.mark.parametrize("mask", ["random", "first"])
@pytest.mark.parametrize(
    ("rows", "columns", "axis"), [(8192, 8192, 0), (8192, 8192, 1), (8192, 22016, 1)]
)
def test_no_rank_sends_more_than_its_shard_of_a_65b_model(
    rows: int, columns: int, axis: int, mask: str
) -> None:
    """A quarter of the channels goes: any of them, or the first ones, which moves all others."""
    count = (rows, columns)[axis]
    drawn = (
        torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count * 3 // 4]
        .sort()
        .values
    )
    cut = AxisCut(
        (rows, columns), axis, drawn if mask == "random" else torch.arange(count // 4, count)
    )
    for world_size in (8, 64, 512):
        most = max(elements_sent(cut, world_size, rank) for rank in range(world_size))
        assert most <= partition_numel(rows * columns, world_size)


class OneRank:
    world_size, rank = 1, 0

    def all_to_all(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        assert send == receive == [len(outgoing)]
        return outgoing


class LastOfThree:
    world_size, rank = 3, 2

    def all_to_all(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return torch.ones(sum(receive))


def test_each_dtype_travels_separately_and_returns_in_order() -> None:
    comm: Any = OneRank()
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    cuts = [
        (
            torch.arange(rows * 3).to(dtype),
            ReshardPlan(AxisCut((rows, 3), 0, torch.arange(1, rows)), 1, 0),
        )
        for rows, dtype in enumerate(dtypes, start=3)
    ]
    for new, (old, _) in zip(reshard(cuts, comm), cuts, strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old[3:])


def test_padding_is_zero() -> None:
    """Norms and scores of whole shards include it."""
    comm: Any = LastOfThree()
    plan = ReshardPlan(AxisCut((7, 2), 0, torch.arange(1, 6)), comm.world_size, comm.rank)
    (shard,) = reshard([(torch.full((5,), math.nan), plan)], comm)
    own = sum(plan.receive.values())
    assert 0 < own < len(shard)
    assert shard.tolist() == [1.0] * own + [0.0] * (len(shard) - own)
