"""`uniform`: the same counts in every open layer, as near to the ratio as whole groups get, the best of each layer."""

import random
from itertools import product

import pytest
import torch

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank_uniform, uniform_goal, with_counts
from loraprune_ds.pruning.target import make_limits
from tests.families import tiny_config
from tests.oracle.formula import keep_best
from tests.paper import PAPER
from tests.refusals import must_name
from tests.unit.shapes_and_scores import (
    LLAMA_7B,
    SMOLLM2,
    gone,
    limits_of,
    make_shape,
    random_limits,
    random_scores_of,
    uniform_counts,
)

TARGETS = [0.2, 0.5, 0.75, 0.9, 0.97, 1.0]  # of the final ratio, as on the way there


def error(limits: Limits, counts: LayerCounts, ratio: float) -> float:
    """How far off a layer's counts are, in parameters of that layer."""
    first = limits.open_layers[0]
    wanted = ratio * limits.dense.linear_numel() / len(limits.open_layers)
    return abs(limits.lost(first, counts) - wanted)


def all_counts(limits: Limits) -> list[LayerCounts]:
    first = limits.open_layers[0]
    dense, floor = limits.dense.counts[first], limits.floor[first]
    heads, channels = (
        [c for c in range(floor[kind], dense[kind] + 1) if c % multiple == 0 or c == dense[kind]]
        for kind, multiple in limits.multiples.items()
    )
    return [LayerCounts(heads=h, channels=c) for h in heads for c in channels]


def test_the_goal_comes_nearest_of_all_counts() -> None:
    draw = random.Random(0)
    for _ in range(400):
        limits, ratio = random_limits(draw, uniform=True), draw.uniform(0.01, 0.95)
        goal, allowed = uniform_goal(limits, ratio), all_counts(limits)
        half_a_step = limits.multiples["channels"] * limits.dense.group_numel("channels") / 2
        assert goal in allowed
        nearest = min(error(limits, counts, ratio) for counts in allowed)
        assert error(limits, goal, ratio) <= max(nearest, half_a_step) + 1e-6


@pytest.mark.parametrize(
    ("family", "ratio", "head_ratio"),
    [
        *(("qwen3_5_text", ratio, None) for ratio in (0.1, 0.3, 0.6)),
        ("qwen3_5_text", 0.4, 0.4),
        ("qwen3_next", 0.3, None),
        ("qwen3_5_moe_text", 0.4, 0.4),
        ("glm4_moe", 0.3, 0.4),
    ],
)
def test_layers_of_several_sorts_have_equal_counts(family: str, ratio: float, head_ratio: float | None) -> None:
    """A delta net has no attention, and a dense layer among sparse ones no experts. A stock class holds the result."""
    dense = shape_from_config(tiny_config(family).to_dict(), family)
    limits = limits_of(dense, ratio=ratio, head_ratio=head_ratio)
    scores, counts = random_scores_of(dense, torch.Generator()), uniform_counts(limits, ratio, ratio)
    left = dense.after(rank_uniform(scores, dense, limits, counts))
    assert left.is_uniform
    assert limits.lost_by_all(uniform_goal(limits, ratio)) == gone(left, dense)
    sizes = [range(limits.floor[1][kind] or 1, count + 1) for kind, count in limits.open_counts.items()]
    allowed = (LayerCounts(zip(dense.kinds, counts, strict=True)) for counts in product(*sizes))
    wanted, half_a_step = ratio * dense.linear_numel(), limits.open_numel[dense.kinds[-1]] / 2
    nearest = min(abs(limits.lost_by_all(counts) - wanted) for counts in allowed)
    assert abs(gone(left, dense) - wanted) <= max(nearest, half_a_step)
    gave = {kind: 1 - max(x[kind] for x in left.counts) / count for kind, count in limits.open_counts.items()}
    asked = head_ratio or (0 if dense.mixture else ratio)
    assert all(abs(gave[kind] - asked) < 0.11 for kind in dense.kinds[:-1])  # half a group of five


def test_what_equal_counts_of_a_hybrid_cannot_reach_is_one_line() -> None:
    dense = shape_from_config(tiny_config("qwen3_5_text").to_dict(), "somewhere")
    must_name("prune.ratio 0.99", limits_of, dense, ratio=0.99)


def test_heads_give_their_share_where_channels_can_make_up_for_the_rest() -> None:
    """However few heads there are: 3 key-value heads cannot give 30 %, so they give one and the channels less."""
    for ratio, heads in ((0.1, 3), (0.2, 2), (0.3, 2), (0.5, 1), (0.55, 1), (0.64, 1)):
        goal = uniform_goal(limits_of(SMOLLM2), ratio)
        assert goal["heads"] == heads
        assert error(limits_of(SMOLLM2), goal, ratio) <= SMOLLM2.group_numel("channels") / 2


def test_the_papers_model() -> None:
    limits = make_limits(PruneConfig(**PAPER, ratio=0.5, channel_multiple=1), LLAMA_7B)  # 27 of 32 layers are open
    goal = uniform_goal(limits, 0.5)
    assert goal["heads"] == 13  # (1 − 0.5 · 32/27) · 32 = 13.04
    assert error(limits, goal, 0.5) <= LLAMA_7B.group_numel("channels") / 2
    rounded = uniform_goal(make_limits(PruneConfig(**PAPER, ratio=0.5, channel_multiple=64), LLAMA_7B), 0.5)
    assert (rounded["heads"], rounded["channels"]) == (13, 4480)


def test_counts_never_grow_on_the_way_and_end_exactly() -> None:
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(150):
        limits, ratio = random_limits(draw, uniform=True), draw.uniform(0.05, 0.8)
        goal, shape = uniform_goal(limits, ratio), limits.dense
        for fraction in TARGETS:
            scores = random_scores_of(shape, generator)
            keep = rank_uniform(scores, shape, limits, uniform_counts(limits, fraction * ratio, ratio))
            shape = shape.after(keep)  # indexing would fail if a count grew
            (counts,) = {shape.counts[i] for i in limits.open_layers}
            for kind, multiple in limits.multiples.items():
                assert counts[kind] >= goal[kind]
                assert counts[kind] % multiple == 0 or counts[kind] == limits.dense.counts[0][kind]
            closed = set(range(len(shape.layers))) - set(limits.open_layers)
            assert all(shape.counts[i] == limits.dense.counts[i] for i in closed)
        assert counts == goal


def test_on_the_way_both_kinds_are_cut_in_proportion() -> None:
    limits = make_limits(PruneConfig(**PAPER, ratio=0.5, channel_multiple=1), LLAMA_7B)
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
        # The scale between layers is nothing.
        scores[2] = LayerScores(heads=scores[2]["heads"] * 1000, channels=scores[2]["channels"] / 1000)
        keep = rank_uniform(scores, shape, limits, uniform_counts(limits, 0.3, 0.3))
        counts = uniform_goal(limits, 0.3)
        for i, (layer, layer_keep) in enumerate(zip(scores, keep, strict=True)):
            wanted = counts if i in (1, 2, 3) else shape.counts[i]
            assert layer_keep["heads"].tolist() == keep_best(layer["heads"], wanted["heads"])
            assert layer_keep["channels"].tolist() == keep_best(layer["channels"], wanted["channels"])
        near = 1.5 * shape.group_numel("channels")
        assert gone(shape.after(keep), shape) == pytest.approx(0.3 * shape.linear_numel(), abs=near)


@pytest.mark.parametrize("ratio", [0.15, 0.31])  # where either kind alone would come nearer
def test_encoder_and_decoder_protect_their_own_layers_and_keep_as_many_heads_of_both_kinds(ratio: float) -> None:
    """So umt5 holds the result."""
    layers = {"num_layers": 3, "num_hidden_layers": 3, "num_decoder_layers": 2}
    shape = shape_from_config(tiny_config("t5", **layers).to_dict(), "t5")
    assert limits_of(shape, protected_first=1, protected_last=0).open_layers == [1, 2, 4]
    limits = limits_of(shape, protected_first=0, protected_last=0, ratio=ratio, channel_multiple=1)
    counts = uniform_goal(limits, ratio)
    assert counts["heads"] == counts["cross_heads"] > 0
    left = with_counts(shape, limits, counts)
    assert left.is_uniform
    assert left.linear_numel() == pytest.approx((1 - ratio) * shape.linear_numel(), rel=0.05)
