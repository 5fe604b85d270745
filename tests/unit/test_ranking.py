"""`global`: the least important groups of all open layers, to within one group of the target, inside all limits."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Normalization
from loraprune_ds.model.groups import LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.importance import GroupSums, MovingAverage
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank
from tests.support.properties import for_any, seed
from tests.support.shapes_and_scores import (
    SMOLLM2,
    goal_of,
    gone,
    make_shape,
    random_goal,
    random_scores_of,
)


def check_limits(limits: Limits, shape: ModelShape) -> None:
    for dense, floor, layer in zip(limits.dense.counts, limits.floor, shape.counts, strict=True):
        for kind, multiple in limits.multiples.items():
            assert dense[kind] >= layer[kind] >= floor[kind]
            assert layer[kind] % multiple == 0 or layer[kind] == dense[kind]


@for_any(150)
def test_every_cut_stops_within_one_group_of_its_target(draw: random.Random) -> None:
    """Over four cuts in a row, on layers of any shape, with few enough distinct scores that most are tied."""
    generator = torch.Generator().manual_seed(seed(draw))
    ratio = draw.uniform(0.02, 0.8)
    ratios = [None, None, 0.2]
    goal = random_goal(draw, uniform=False, ratio=[ratio], ranking=["global"], head_ratio=ratios)
    limits = goal.limits
    dense = shape = limits.dense
    steps = {
        kind: multiple * dense.group_numel[kind] for kind, multiple in limits.multiples.items()
    }
    allowed = max(steps.values()) + steps["channels"] / 2
    for fraction in (0.3, 0.7, 0.9, 1.0):
        scores = random_scores_of(shape, generator, levels=draw.choice([None, 4]))
        shape = shape.after(rank(scores, shape, goal, fraction))
        check_limits(limits, shape)
        assert abs(gone(shape, dense) - fraction * ratio * dense.linear_numel()) <= allowed


@pytest.mark.parametrize("multiple", [1, 64])
def test_without_floors_it_stops_within_half_a_multiple_of_channels(multiple: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for target in (0.1, 0.27, 0.333, 0.7):
        goal = goal_of(SMOLLM2, ranking="global", ratio=target, channel_multiple=multiple)
        keep = rank(random_scores_of(SMOLLM2, generator), SMOLLM2, goal, 1)
        off = gone(SMOLLM2.after(keep), SMOLLM2) - target * SMOLLM2.linear_numel()
        assert abs(off) <= multiple * SMOLLM2.group_numel["channels"] / 2 + 0.5


def split_groups(
    scores: list[LayerScores], keep: list[LayerKeep], kind: str
) -> tuple[list[Any], list[Any]]:
    """(score, -layer, -index) of what goes and of what stays."""
    goes, stays = [], []
    for i, (layer, layer_keep) in enumerate(zip(scores, keep, strict=True)):
        kept = set(layer_keep[kind].tolist())  # type: ignore[arg-type]
        for index, score in enumerate(layer[kind].tolist()):  # type: ignore[arg-type]
            (stays if index in kept else goes).append((score, -i, -index))
    return goes, stays


@pytest.mark.parametrize("levels", [None, 5, 1])
def test_the_least_important_of_all_layers_go_and_ties_keep_the_lower_index(
    levels: int | None,
) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = make_shape([(9, 40), (7, 55), (8, 20), (9, 30)])
    goal = goal_of(shape, ranking="global", ratio=0.4)
    for _ in range(20):
        scores = random_scores_of(shape, generator, levels=levels)
        # A large minimum in every layer, so that no floor stops anything.
        for layer in scores:
            layer["heads"][0] = layer["channels"][0] = 99
        keep = rank(scores, shape, goal, 1)
        for kind in shape.kinds:
            goes, stays = split_groups(scores, keep, kind)
            assert max(goes) < min(stays)  # by score, then the higher layer, then the higher index


def test_heads_keep_to_their_share_over_several_cuts() -> None:
    """Though by their scores all heads would go first: what channels have lost is not heads' to spend."""
    shape = dense = make_shape([(8, 96)] * 4)
    generator = torch.Generator().manual_seed(7)
    for target, heads in ((0.125, 4), (0.25, 8), (0.5, 16)):
        scores = [
            LayerScores({**x, "heads": x["heads"] * 1e-6})
            for x in random_scores_of(shape, generator)
        ]
        shape = shape.after(rank(scores, shape, goal_of(dense, ranking="global", ratio=target), 1))
        assert (
            sum(
                d["heads"] - layer["heads"]
                for d, layer in zip(dense.counts, shape.counts, strict=True)
            )
            == heads
        )


def test_heads_that_make_up_for_channels_go_by_what_is_left_of_them() -> None:
    """Channels end at their floor. Layer 0 has lost its one cheap head by then; its others are dear."""
    shape = make_shape([(8, 16)] * 2, hidden=8, head_dim=2)
    target = 5 * shape.group_numel["heads"] / shape.linear_numel()
    goal = goal_of(shape, ranking="global", ratio=target)
    floor = (LayerCounts(heads=1, channels=16),) * 2
    goal = replace(goal, limits=replace(goal.limits, floor=floor))
    heads = ([0.0, 90, 91, 92, 93, 94, 95, 96], [1.0, 2, 3, 4, 5, 6, 7, 8])
    scores = [LayerScores(heads=torch.tensor(x), channels=torch.ones(16)) for x in heads]
    keep = rank(scores, shape, goal, 1)
    assert [layer["heads"].tolist() for layer in keep] == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("first", "second", "blocks", "kept"),
    [
        # the worst channel, and the worst block
        ([0, 9, 9, 9, 9, 9, 9, 9], [1, 9, 1, 9, 1, 9, 1, 9], 1, [8, 4]),
        # the best of two next blocks
        ([0] * 4 + [1, 1, 1, 9] + [10] * 4, [0.5] * 4 + [5] * 4 + [10] * 4, 3, [4, 8]),
        # the worst of two next blocks
        ([0] * 4 + [1, 9, 9, 9] + [10] * 4, [0.5] * 4 + [5] * 4 + [10] * 4, 3, [8, 4]),
    ],
)
def test_a_block_counts_with_its_mean(
    first: list[float], second: list[float], blocks: int, kept: list[int]
) -> None:
    shape = make_shape([(1, len(first))] * 2, hidden=4, head_dim=1)
    scores = [
        LayerScores(heads=torch.ones(1), channels=torch.tensor(x, dtype=torch.float64))
        for x in (first, second)
    ]
    target = blocks * 4 * shape.group_numel["channels"] / shape.linear_numel()
    goal = goal_of(shape, ranking="global", ratio=target, channel_multiple=4)
    keep = rank(scores, shape, goal, 1)
    assert [len(layer["channels"]) for layer in keep] == kept
    if blocks == 1:
        assert keep[1]["channels"].tolist() == [1, 3, 5, 7]


def test_rounding_never_breaks_a_multiple() -> None:
    """The means of blocks of equal scores differ in the last bit; the smaller first block must still leave first."""
    shape = make_shape([(1, 173)] * 2, hidden=4, head_dim=1)
    target, generator = (
        45 * shape.group_numel["channels"] / shape.linear_numel(),
        torch.Generator().manual_seed(8),
    )
    goal = goal_of(shape, ranking="global", ratio=target, channel_multiple=64)
    for value in torch.rand(300, generator=generator, dtype=torch.float64):
        tied = [LayerScores(heads=torch.ones(1), channels=value.expand(173)) for _ in range(2)]
        left = shape.after(rank(tied, shape, goal, 1))
        assert [layer["channels"] for layer in left.counts] == [173, 128]


@pytest.mark.parametrize(
    ("normalize", "left_whole"), [(PruneConfig().normalize, []), ("none", [2])]
)
def test_one_step_with_large_gradients_leaves_no_layer_whole(
    normalize: Normalization, left_whole: list[int]
) -> None:
    """In step 5 of 20 the scores of layer 2 are a million times as large. Without the default they decide for good."""
    shape, generator = make_shape([(4, 60)] * 6), torch.Generator().manual_seed(3)
    linears, average = shape.input_linears(), MovingAverage(0.9)
    for step in range(20):
        counts = [shape.counts[i][linear.spans[0].kind] for i, linear in linears]
        parts = [torch.rand(count, generator=generator).double() for count in counts]
        if step == 5:
            parts = [
                scores * 1e6 if layer == 2 else scores
                for (layer, _), scores in zip(linears, parts, strict=True)
            ]
        average.update(GroupSums(shape, linears, parts, step).by_layer(normalize))
    scores = average.on_host()
    assert scores is not None
    goal = goal_of(shape, ranking="global", ratio=0.4)
    pruned = shape.after(rank(scores, shape, goal, 1))
    assert [i for i, layer in enumerate(pruned.counts) if layer == shape.counts[i]] == left_whole
