"""Plans the reshard of LLaMA-65B for all ranks, without weights."""

from itertools import pairwise

import pytest
import torch

from loraprune_ds.errors import RunError
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.plan.request import read_shape
from loraprune_ds.plan.traffic import layer_cuts, moved_bytes
from loraprune_ds.zero.flat import Owners, ReshardPlan
from tests.benchmarks.repartition import MASKS, Repartition, example_masks, plan_repartition

DENSE = read_shape("llama-65b")
SMALL = DENSE.with_layers((LayerShape(heads=48, channels=16512),) * 80)  # a quarter gone


def plan(mask: str, world_size: int, layers: int = 80) -> Repartition:
    dense, small = (shape.with_layers(shape.layers[:layers]) for shape in (DENSE, SMALL))
    return plan_repartition(dense, example_masks(dense, small, mask, 0), world_size, lora_rank=8, element_size=2)


@pytest.mark.parametrize("mask", MASKS)
def test_no_rank_sends_more_than_its_shard_and_bytes_fall_with_the_ranks(mask: str) -> None:
    plans = [plan(mask, 8), plan(mask, 64), plan(mask, 512, layers=8)]
    for found in plans:
        assert (found.sent <= found.shard).all()
        assert found.sent.sum() == found.received.sum()
        assert found.sent.max() < found.gathered / 5
    busiest = [int(found.sent.max()) for found in plans]
    busiest[2] *= 10  # layers of equal counts: a tenth of them was planned
    assert all(more > fewer for more, fewer in pairwise(busiest))


def test_the_planner_and_the_table_count_the_same_bytes() -> None:
    keep = example_masks(DENSE, SMALL, "real-looking", 1)
    found = plan_repartition(DENSE, keep, 8, lora_rank=8, element_size=2)
    counted = [moved_bytes(layer_cuts(DENSE, i, k, 8), 8, 2) for i, k in enumerate(keep)]
    assert torch.equal(found.sent, torch.stack(counted).sum(0))


def test_the_plan_of_all_ranks_is_that_of_each() -> None:
    cut = layer_cuts(DENSE, 0, example_masks(DENSE, SMALL, "random", 2)[0], 8)[0][0]
    owners, ranks = Owners(cut, 64), torch.arange(64)
    sends, receives = owners.sent_by(ranks), owners.received_by(ranks)
    for rank in (0, 1, 31, 63):
        of_rank = ReshardPlan(cut, 64, rank)
        for given, counts in ((of_rank.send, sends[rank]), (of_rank.receive, receives[rank])):
            assert [given.get(other, 0) for other in range(64)] == counts.tolist()


def test_ranks_that_do_not_agree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Owners.sent_by

    def one_rank_lies(self: Owners, ranks: torch.Tensor) -> torch.Tensor:
        sends = honest(self, ranks)
        sends[3, 3] += 1
        return sends

    monkeypatch.setattr(Owners, "sent_by", one_rank_lies)
    with pytest.raises(RunError, match=r"layer 0 .*: rank 3 sends what others do not expect"):
        plan("random", 8)
