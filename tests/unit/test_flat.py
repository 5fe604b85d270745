"""The geometry of a cut on flat shards, with every rank simulated. All plans together are an index_select."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from loraprune_ds.zero.flat import AxisCut, ReshardPlan, owned_range, partition_numel

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    whole: Tensor
    cut: AxisCut
    world_size: int

    def shards(self) -> list[Tensor]:
        """Returns what each rank holds. All have equal lengths, and the padding is poisoned."""
        size = partition_numel(self.whole.numel(), self.world_size)
        padding = self.whole.new_full((size * self.world_size - self.whole.numel(),), NAN)
        return list(torch.cat([self.whole.reshape(-1), padding]).split(size))

    def plans(self) -> list[ReshardPlan]:
        return [ReshardPlan(self.cut, self.world_size, rank) for rank in range(self.world_size)]

    def expected(self) -> Tensor:
        return self.left().reshape(-1)

    def left(self) -> Tensor:
        return self.whole.index_select(self.cut.axis, self.cut.keep)


def random_case(draw: random.Random) -> Case:
    shape = (draw.randint(1, 23),) if draw.random() < 0.15 else (draw.randint(1, 23), draw.randint(1, 23))
    axis = draw.randrange(len(shape))
    keep = torch.tensor(sorted(draw.sample(range(shape[axis]), draw.randint(1, shape[axis]))))
    # Every element tells where it came from.
    whole = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    return Case(whole, AxisCut(shape, axis, keep), draw.randint(1, 9))


def exchange(case: Case, plans: list[ReshardPlan]) -> list[Tensor]:
    """Returns the new shards, as an all-to-all of what every rank takes would deliver them."""
    empty = case.whole.reshape(-1)[:0]
    outgoing = [
        dict(zip(plan.send, plan.take(shard).split(list(plan.send.values())), strict=True))
        for plan, shard in zip(plans, case.shards(), strict=True)
    ]
    return [torch.cat([parts.get(rank, empty) for parts in outgoing]) for rank in range(case.world_size)]


@pytest.mark.parametrize("seed", range(3))
def test_all_ranks_together_select_what_stays(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(1000):
        case = random_case(draw)
        plans = case.plans()
        for sender, plan in enumerate(plans):
            arrives = {rank: other.receive[sender] for rank, other in enumerate(plans) if sender in other.receive}
            assert plan.send == arrives
            assert all(plan.send.values())
        shards = exchange(case, plans)
        for plan, shard in zip(plans, shards, strict=True):
            assert len(shard) == sum(plan.receive.values()) == plan.new[1] - plan.new[0] <= plan.new_partition
        assert torch.equal(torch.cat(shards), case.expected()), case


def test_moved_counts_the_elements_that_change_owner() -> None:
    draw = random.Random(3)
    for _ in range(300):
        case = random_case(draw)
        plans = case.plans()
        owner = torch.cat([torch.full((end - start,), rank) for rank, (start, end) in enumerate(p.old for p in plans)])
        new_owner = torch.cat(
            [torch.full((end - start,), rank) for rank, (start, end) in enumerate(p.new for p in plans)]
        )
        old_owner = owner[case.expected().long()]  # an element's value is its old flat position
        for rank, plan in enumerate(plans):
            assert plan.moved == ((old_owner == rank) & (new_owner != rank)).sum()


def test_keeping_all_moves_nothing() -> None:
    cut = AxisCut((5, 7), 1, torch.arange(7))
    assert [ReshardPlan(cut, 4, rank).moved for rank in range(4)] == [0] * 4


def test_kept_before_counts_element_by_element() -> None:
    draw = random.Random(4)
    for _ in range(200):
        case = random_case(draw)
        stays = torch.isin(case.whole, case.expected())  # an element's value is its old flat position
        counts = [0, *stays.reshape(-1).cumsum(0).tolist()]
        assert case.cut.kept_before(torch.arange(case.whole.numel() + 1)).tolist() == counts
        assert case.cut.new_shape == case.left().shape


def test_a_cut_keeps_the_dtype_and_every_bit() -> None:
    whole = torch.randn(6, 10).to(torch.bfloat16)
    case = Case(whole, AxisCut((6, 10), 1, torch.tensor([0, 3, 4, 9])), 3)
    shards = torch.cat(exchange(case, case.plans()))
    assert shards.dtype == torch.bfloat16
    assert torch.equal(shards, case.expected())


@pytest.mark.parametrize(
    ("numel", "world_size", "ranges"),
    [
        (10, 1, [(0, 10)]),
        (10, 2, [(0, 5), (5, 10)]),
        (10, 3, [(0, 4), (4, 8), (8, 10)]),
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (5, 4, [(0, 2), (2, 4), (4, 5), (5, 5)]),  # the last rank owns nothing but padding
        (2, 5, [(0, 1), (1, 2), (2, 2), (2, 2), (2, 2)]),
    ],
)
def test_owned_ranges(numel: int, world_size: int, ranges: list[tuple[int, int]]) -> None:
    assert [owned_range(numel, world_size, rank) for rank in range(world_size)] == ranges
