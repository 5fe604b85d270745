"""A made-up family with a third kind of groups goes through shapes, masks, limits and ranking by its table alone."""

import pytest
import torch

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.cuts import layer_cuts
from loraprune_ds.model.family import ATTENTION, FAMILIES, GATED
from loraprune_ds.model.family_row import Family, Linear, Part
from loraprune_ds.model.per_kind import LayerKeep, LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.importance import LayerScores, MovingAverage, random_scores
from loraprune_ds.pruning.limits import Limits, make_limits
from loraprune_ds.pruning.ranking import rank_global, rank_uniform
from loraprune_ds.pruning.step import all_groups
from tests.unit.shapes_and_scores import gone

EXPERTS = (Part("experts", "head"),)
THREE = Family((*ATTENTION, Linear("moe.up_proj", 0, EXPERTS), Linear("moe.down_proj", 1, EXPERTS), *GATED))
LAYER = LayerShape(heads=4, experts=6, channels=60)


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    monkeypatch.setitem(FAMILIES, "three", THREE)
    return ModelShape("three", 16, 4, 2, 50, False, (LAYER,) * 4)


def limits_of(shape: ModelShape) -> Limits:
    config = PruneConfig(ratio=0.5, protected_first=1, protected_last=0, channel_multiple=1)
    return make_limits(config, shape)


def test_the_kinds_come_in_the_order_of_the_forward(shape: ModelShape) -> None:
    assert shape.kinds == ("heads", "experts", "channels")
    assert FAMILIES["llama"].kinds == ("heads", "channels")


def test_equal_counts_are_one_shape_in_any_order() -> None:
    assert len({LAYER, LayerShape(channels=60, experts=6, heads=4)}) == 1
    assert LAYER != LayerShape(heads=4, experts=5, channels=60)


def test_a_group_of_the_third_kind_leaves_with_its_rows(shape: ModelShape) -> None:
    keep = LayerKeep(heads=torch.arange(4), experts=torch.tensor([0, 2]), channels=torch.arange(60))
    cuts = {name: (kept.axis, kept.keep.tolist()) for name, kept, _ in layer_cuts(shape, 0, keep)}
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    assert cuts == {"moe.up_proj.weight": (0, rows), "moe.down_proj.weight": (1, rows)}
    left = shape.after([keep, *all_groups(shape)[1:]])
    assert left.layers[0] == LayerShape(heads=4, experts=2, channels=60)
    assert shape.linear_numel() - left.linear_numel() == 4 * shape.group_numel("experts") == 4 * 2 * 4 * 16


def test_averages_follow_a_cut(shape: ModelShape) -> None:
    average = MovingAverage(0.9)
    average.update([LayerScores(heads=torch.ones(4), experts=torch.arange(6.0), channels=torch.ones(60))])
    average.cut([LayerKeep(heads=torch.arange(4), experts=torch.tensor([1, 5]), channels=torch.arange(60))])
    assert average.scores is not None
    torch.testing.assert_close(average.scores[0]["experts"], torch.tensor([0.1, 0.5]))


def test_uniform_comes_as_near_as_whole_channels_get(shape: ModelShape) -> None:
    limits, scores = limits_of(shape), random_scores(shape, 0)
    left = shape.after(rank_uniform(scores, shape, limits, 0.5, 0.5))
    assert left.layers[0] == LAYER  # protected
    assert len(set(left.layers[1:])) == 1
    assert all(left.layers[1][kind] < LAYER[kind] for kind in shape.kinds)
    assert abs(gone(left, shape) - 0.5 * shape.linear_numel()) <= 3 * shape.group_numel("channels") / 2


def test_global_reaches_the_target(shape: ModelShape) -> None:
    limits, scores = limits_of(shape), random_scores(shape, 0)
    left = shape.after(rank_global(scores, shape, limits, 0.5))
    assert abs(gone(left, shape) - 0.5 * shape.linear_numel()) <= max(map(shape.group_numel, shape.kinds))
    for kind in ("heads", "experts"):  # each gives its share, the channels the rest
        of_kind = sum(LAYER[kind] - layer[kind] for layer in left.layers) * shape.group_numel(kind)
        share = limits.shares[kind] * gone(left, shape)
        assert abs(of_kind - share) <= shape.group_numel(kind)


def test_the_narrowest_shapes_cover_all_counts_of_the_coarse_kinds(shape: ModelShape) -> None:
    limits = limits_of(shape)
    narrowest = list(limits.narrowest(1))
    assert {(x["heads"], x["experts"]) for x in narrowest} == {(h, e) for h in range(1, 5) for e in range(1, 7)}
    assert {x["channels"] for x in narrowest} == {1}
