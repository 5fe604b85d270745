"""Which groups go: by `global` to within one group of the target, by `uniform` the same counts in every open layer."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.shapes import LayerKeep, LayerShape, ModelShape
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank_global, rank_uniform, uniform_counts, uniform_goal
from loraprune_ds.pruning.target import make_limits
from tests.oracle.formula import keep_best
from tests.unit.shapes_and_scores import LLAMA_7B, SMOLLM2, gone, limits_of, make_shape, random_limits, random_scores_of

# `global`


def check_limits(limits: Limits, shape: ModelShape) -> None:
    for i, (dense, floor, layer) in enumerate(zip(limits.dense.layers, limits.floor, shape.layers, strict=True)):
        assert limits.lost(i, layer) <= limits.layer_budget[i]
        for kind, multiple in limits.multiples.items():
            assert dense[kind] >= layer[kind] >= floor[kind]
            assert layer[kind] % multiple == 0 or layer[kind] == dense[kind]


def test_every_cut_stops_within_one_group_of_its_target() -> None:
    """Over four cuts in a row, on layers of any shape, with few enough distinct scores that most are tied."""
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(250):
        ratio = draw.uniform(0.02, 0.8)
        ratios = [None, None, 0.2]
        limits = random_limits(draw, uniform=False, ratio=[ratio], ranking=["global"], head_ratio=ratios)
        dense = shape = limits.dense
        steps = {kind: multiple * dense.group_numel(kind) for kind, multiple in limits.multiples.items()}
        allowed = max(steps.values()) + steps["channels"] / 2
        for fraction in (0.3, 0.7, 0.9, 1.0):
            scores = random_scores_of(shape, generator, levels=draw.choice([None, 4]))
            shape = shape.after(rank_global(scores, shape, limits, fraction * ratio))
            check_limits(limits, shape)
            assert abs(gone(shape, dense) - fraction * ratio * dense.linear_numel()) <= allowed


def test_without_floors_and_caps_it_stops_within_half_a_channel() -> None:
    generator = torch.Generator().manual_seed(2)
    limits = limits_of(SMOLLM2, ranking="global")
    for target in (0.1, 0.333, 0.5, 0.7):
        keep = rank_global(random_scores_of(SMOLLM2, generator), SMOLLM2, limits, target)
        off = gone(SMOLLM2.after(keep), SMOLLM2) - target * SMOLLM2.linear_numel()
        assert abs(off) <= SMOLLM2.group_numel("channels") / 2 + 0.5


def split_groups(scores: list[LayerScores], keep: list[LayerKeep], kind: str) -> tuple[list[Any], list[Any]]:
    """(score, -layer, -index) of what goes and of what stays."""
    goes, stays = [], []
    for i, (layer, layer_keep) in enumerate(zip(scores, keep, strict=True)):
        kept = set(layer_keep[kind].tolist())  # type: ignore[arg-type]
        for index, score in enumerate(layer[kind].tolist()):  # type: ignore[arg-type]
            (stays if index in kept else goes).append((score, -i, -index))
    return goes, stays


@pytest.mark.parametrize("levels", [None, 5, 1])
def test_the_least_important_of_all_layers_go_and_ties_keep_the_lower_index(levels: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = make_shape([(9, 40), (7, 55), (8, 20), (9, 30)])
    limits = limits_of(shape, ranking="global")
    for _ in range(20):
        scores = random_scores_of(shape, generator, levels=levels)
        # A large minimum in every layer, so that no floor stops anything.
        for layer in scores:
            layer["heads"][0] = layer["channels"][0] = 99
        keep = rank_global(scores, shape, limits, 0.4)
        for kind in shape.kinds:
            goes, stays = split_groups(scores, keep, kind)
            assert max(goes) < min(stays)  # by score, then the higher layer, then the higher index


def test_heads_keep_to_their_share_over_several_cuts() -> None:
    """Though by their scores all heads would go first: what channels have lost is not heads' to spend."""
    shape = dense = make_shape([(8, 96)] * 4)
    limits, generator = limits_of(shape, ranking="global"), torch.Generator().manual_seed(7)
    for target, heads in ((0.125, 4), (0.25, 8), (0.5, 16)):
        scores = [LayerScores({**x, "heads": x["heads"] * 1e-6}) for x in random_scores_of(shape, generator)]
        shape = shape.after(rank_global(scores, shape, limits, target))
        assert sum(d["heads"] - layer["heads"] for d, layer in zip(dense.layers, shape.layers, strict=True)) == heads


def test_heads_that_make_up_for_channels_go_by_what_is_left_of_them() -> None:
    """Channels end at their floor. Layer 0 has lost its one cheap head by then; its others are dear."""
    shape = make_shape([(8, 16)] * 2, hidden=8, head_dim=2)
    limits = replace(limits_of(shape, ranking="global"), floor=(LayerShape(heads=1, channels=16),) * 2)
    heads = ([0.0, 90, 91, 92, 93, 94, 95, 96], [1.0, 2, 3, 4, 5, 6, 7, 8])
    scores = [LayerScores(heads=torch.tensor(x), channels=torch.ones(16)) for x in heads]
    target = 5 * shape.group_numel("heads") / shape.linear_numel()
    keep = rank_global(scores, shape, limits, target)
    assert [layer["heads"].tolist() for layer in keep] == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("first", "second", "blocks", "kept"),
    [
        ([0, 9, 9, 9, 9, 9, 9, 9], [1, 9, 1, 9, 1, 9, 1, 9], 1, [8, 4]),  # the worst channel, and the worst block
        ([0] * 4 + [1, 1, 1, 9] + [10] * 4, [0.5] * 4 + [5] * 4 + [10] * 4, 3, [4, 8]),  # the best of two next blocks
        ([0] * 4 + [1, 9, 9, 9] + [10] * 4, [0.5] * 4 + [5] * 4 + [10] * 4, 3, [8, 4]),  # the worst of two next blocks
    ],
)
def test_a_block_of_channels_counts_with_its_mean(
    first: list[float], second: list[float], blocks: int, kept: list[int]
) -> None:
    shape = make_shape([(1, len(first))] * 2, hidden=4, head_dim=1)
    scores = [LayerScores(heads=torch.ones(1), channels=torch.tensor(x, dtype=torch.float64)) for x in (first, second)]
    target = blocks * 4 * shape.group_numel("channels") / shape.linear_numel()
    keep = rank_global(scores, shape, limits_of(shape, ranking="global", channel_multiple=4), target)
    assert [len(layer["channels"]) for layer in keep] == kept
    if blocks == 1:
        assert keep[1]["channels"].tolist() == [1, 3, 5, 7]


def test_rounding_never_breaks_a_multiple() -> None:
    """The means of blocks of equal scores differ in the last bit; the smaller first block must still leave first."""
    shape = make_shape([(1, 173)] * 2, hidden=4, head_dim=1)
    limits, generator = limits_of(shape, ranking="global", channel_multiple=64), torch.Generator().manual_seed(8)
    target = 45 * shape.group_numel("channels") / shape.linear_numel()
    for value in torch.rand(300, generator=generator, dtype=torch.float64):
        tied = [LayerScores(heads=torch.ones(1), channels=value.expand(173)) for _ in range(2)]
        left = shape.after(rank_global(tied, shape, limits, target))
        assert [layer["channels"] for layer in left.layers] == [173, 128]


# `uniform`

TARGETS = [0.2, 0.5, 0.75, 0.9, 0.97, 1.0]  # of the final ratio, as on the way there


def error(limits: Limits, counts: LayerShape, ratio: float) -> float:
    """How far off a layer's counts are, in parameters of that layer."""
    first = limits.open_layers[0]
    wanted = ratio * limits.dense.linear_numel() / len(limits.open_layers)
    return abs(limits.lost(first, counts) - wanted)


def all_counts(limits: Limits) -> list[LayerShape]:
    first = limits.open_layers[0]
    dense, floor = limits.dense.layers[first], limits.floor[first]
    heads, channels = (
        [c for c in range(floor[kind], dense[kind] + 1) if c % multiple == 0 or c == dense[kind]]
        for kind, multiple in limits.multiples.items()
    )
    counts = [LayerShape(heads=h, channels=c) for h in heads for c in channels]
    return [c for c in counts if limits.lost(first, c) <= limits.layer_budget[first]]


def test_the_goal_comes_nearest_of_all_counts() -> None:
    draw = random.Random(0)
    for _ in range(400):
        limits, ratio = random_limits(draw, uniform=True), draw.uniform(0.01, 0.95)
        goal, allowed = uniform_goal(limits, ratio), all_counts(limits)
        half_a_step = limits.multiples["channels"] * limits.dense.group_numel("channels") / 2
        assert goal in allowed
        nearest = min(error(limits, counts, ratio) for counts in allowed)
        assert error(limits, goal, ratio) <= max(nearest, half_a_step) + 1e-6


def test_heads_give_their_share_where_channels_can_make_up_for_the_rest() -> None:
    """However few heads there are: 3 key-value heads cannot give 30 %, so they give one and the channels less."""
    for ratio, heads in ((0.1, 3), (0.2, 2), (0.3, 2), (0.5, 1), (0.55, 1), (0.64, 1)):
        goal = uniform_goal(limits_of(SMOLLM2), ratio)
        assert goal["heads"] == heads
        assert error(limits_of(SMOLLM2), goal, ratio) <= SMOLLM2.group_numel("channels") / 2


def test_the_papers_model() -> None:
    limits = make_limits(PruneConfig(ratio=0.5, channel_multiple=1), LLAMA_7B)  # 27 of 32 layers are open
    goal = uniform_goal(limits, 0.5)
    assert goal["heads"] == 13  # (1 − 0.5 · 32/27) · 32 = 13.04
    assert error(limits, goal, 0.5) <= LLAMA_7B.group_numel("channels") / 2
    rounded = uniform_goal(make_limits(PruneConfig(ratio=0.5, channel_multiple=64), LLAMA_7B), 0.5)
    assert (rounded["heads"], rounded["channels"]) == (13, 4480)


def test_where_channels_end_heads_give_more_and_the_other_way_round() -> None:
    """With 1200 channels left in each layer, heads have to give more than their share."""
    channels_end = replace(limits_of(SMOLLM2), floor=(LayerShape(heads=1, channels=1200),) * 30)
    assert uniform_goal(channels_end, 0.4) == LayerShape(heads=1, channels=1200)
    heads_end = limits_of(SMOLLM2, tensor_parallel=3)
    goal = uniform_goal(heads_end, 0.4)
    assert goal["heads"] == 3
    assert error(heads_end, goal, 0.4) <= SMOLLM2.group_numel("channels") / 2


def test_a_head_larger_than_what_should_go_stays() -> None:
    """One of two heads is 28.6 % of this layer: nearer to its share of 26 %, but no channel can be given back."""
    shape = make_shape([(2, 10)] * 2, hidden=8, head_dim=5)
    assert uniform_goal(limits_of(shape), 0.26) == LayerShape(heads=2, channels=4)
    assert uniform_goal(limits_of(shape), 0.29) == LayerShape(heads=1, channels=10)


def test_counts_never_grow_on_the_way_and_end_exactly() -> None:
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(150):
        limits, ratio = random_limits(draw, uniform=True), draw.uniform(0.05, 0.8)
        goal, shape = uniform_goal(limits, ratio), limits.dense
        for fraction in TARGETS:
            scores = random_scores_of(shape, generator)
            keep = rank_uniform(scores, shape, limits, fraction * ratio, ratio)
            shape = shape.after(keep)  # indexing would fail if a count grew
            (counts,) = {shape.layers[i] for i in limits.open_layers}
            for kind, multiple in limits.multiples.items():
                assert counts[kind] >= goal[kind]
                assert counts[kind] % multiple == 0 or counts[kind] == limits.dense.layers[0][kind]
            closed = set(range(len(shape.layers))) - set(limits.open_layers)
            assert all(shape.layers[i] == limits.dense.layers[i] for i in closed)
        assert counts == goal


def test_on_the_way_both_kinds_are_cut_in_proportion() -> None:
    limits = make_limits(PruneConfig(ratio=0.5, channel_multiple=1), LLAMA_7B)
    counts = uniform_counts(limits, 0.25, 0.5)
    goal = uniform_goal(limits, 0.5)
    assert abs(counts["heads"] - (32 + goal["heads"]) / 2) <= 0.5
    assert abs(counts["channels"] - (11008 + goal["channels"]) / 2) <= 0.5
    reached = len(limits.open_layers) * limits.lost(4, counts) / LLAMA_7B.linear_numel()
    assert reached == pytest.approx(0.25, abs=0.005)  # half a head in every layer


def test_the_best_of_each_layer_by_its_own_scores_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    shape = make_shape([(6, 50)] * 5)
    limits = limits_of(shape, protected_first=1, protected_last=1)
    for levels in (None, 3, 1):  # 1: all groups are tied
        scores = random_scores_of(shape, generator, levels=levels)
        scores[2] = LayerScores(
            heads=scores[2]["heads"] * 1000, channels=scores[2]["channels"] / 1000
        )  # scale between layers is nothing
        keep = rank_uniform(scores, shape, limits, 0.3, 0.3)
        counts = uniform_goal(limits, 0.3)
        for i, (layer, layer_keep) in enumerate(zip(scores, keep, strict=True)):
            wanted = counts if i in (1, 2, 3) else shape.layers[i]
            assert layer_keep["heads"].tolist() == keep_best(layer["heads"], wanted["heads"])
            assert layer_keep["channels"].tolist() == keep_best(layer["channels"], wanted["channels"])
        assert gone(shape.after(keep), shape) == pytest.approx(
            0.3 * shape.linear_numel(), abs=1.5 * shape.group_numel("channels")
        )
