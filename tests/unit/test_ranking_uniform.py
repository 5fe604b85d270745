"""`uniform`: the same counts in every open layer, as near to the ratio as whole groups get, the best of each layer."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank
from tests.oracle.formula import keep_best
from tests.support.families import tiny_config
from tests.support.paper import PAPER
from tests.support.properties import for_any, seed
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import (
    LLAMA_7B,
    SMOLLM2,
    goal_of,
    gone,
    make_shape,
    random_goal,
    random_scores_of,
)

TARGETS = [0.2, 0.5, 0.75, 0.9, 0.97, 1.0]  # of the final ratio, as on the way there


def error(limits: Limits, counts: LayerCounts, ratio: float) -> float:
    """How far off equal counts are, in parameters of one open layer."""
    dense, layers = limits.dense, len(limits.open_layers)
    return abs(gone(limits.with_equal(counts), dense) - ratio * dense.linear_numel()) / layers


def all_counts(limits: Limits) -> list[LayerCounts]:
    first = limits.open_layers[0]
    dense, floor = limits.dense.counts[first], limits.floor[first]
    heads, channels = (
        [c for c in range(floor[kind], dense[kind] + 1) if c % multiple == 0 or c == dense[kind]]
        for kind, multiple in limits.multiples.items()
    )
    return [LayerCounts(heads=h, channels=c) for h in heads for c in channels]


@for_any(200)
def test_the_goal_comes_nearest_of_all_counts(draw: random.Random) -> None:
    goal, ratio = random_goal(draw, uniform=True), draw.uniform(0.01, 0.95)
    limits = goal.limits
    counts, allowed = replace(goal, ratio=ratio).equal_counts, all_counts(limits)
    half_a_step = limits.multiples["channels"] * limits.dense.group_numel["channels"] / 2
    assert counts in allowed
    nearest = min(error(limits, x, ratio) for x in allowed)
    assert error(limits, counts, ratio) <= max(nearest, half_a_step) + 1e-6


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
def test_layers_of_several_sorts_have_equal_counts(
    family: str, ratio: float, head_ratio: float | None
) -> None:
    """A delta net has no attention, and a dense layer among sparse ones no experts. A stock class holds the result."""
    dense = shape_from_config(tiny_config(family).to_dict(), family)
    goal = goal_of(dense, ratio=ratio, head_ratio=head_ratio)
    limits = goal.limits
    scores, most = random_scores_of(dense, torch.Generator()), limits.most
    left = dense.after(rank(scores, dense, goal, 1))
    assert left.is_uniform
    sizes = [range(limits.floor[1][kind] or 1, count + 1) for kind, count in most.items()]
    allowed = (LayerCounts(zip(dense.kinds, counts, strict=True)) for counts in product(*sizes))
    half_a_step = limits.equal_numel[dense.kinds[-1]] / 2 / len(limits.open_layers)
    nearest = min(error(limits, counts, ratio) for counts in allowed)
    assert error(limits, goal.equal_counts, ratio) <= max(nearest, half_a_step)
    gave = {kind: 1 - max(x[kind] for x in left.counts) / count for kind, count in most.items()}
    asked = head_ratio or (0 if dense.mixture else ratio)
    assert all(abs(gave[kind] - asked) < 0.11 for kind in dense.kinds[:-1])  # half a group of five
    must_name("prune.ratio 0.99", goal_of, dense, ratio=0.99)


def test_heads_give_their_share_where_channels_can_make_up_for_the_rest() -> None:
    """However few heads there are: 3 key-value heads cannot give 30 %, so they give one and the channels less."""
    for ratio, heads in ((0.1, 3), (0.2, 2), (0.3, 2), (0.5, 1), (0.55, 1), (0.64, 1)):
        goal = goal_of(SMOLLM2, ratio=ratio)
        assert goal.equal_counts["heads"] == heads
        assert error(goal.limits, goal.equal_counts, ratio) <= SMOLLM2.group_numel["channels"] / 2


def test_the_papers_model_and_both_kinds_in_proportion_on_the_way() -> None:
    goal = goal_of(LLAMA_7B, **PAPER, ratio=0.5)  # 27 of 32 layers are open
    final = goal.equal_counts
    assert final["heads"] == 13  # (1 − 0.5 · 32/27) · 32 = 13.04
    assert error(goal.limits, final, 0.5) <= LLAMA_7B.group_numel["channels"] / 2
    halfway = goal.counts_at(0.5)
    assert all(
        abs(halfway[kind] - (dense + final[kind]) / 2) <= 0.5
        for kind, dense in LLAMA_7B.counts[0].items()
    )
    reached = gone(goal.shape_at(0.5), LLAMA_7B) / LLAMA_7B.linear_numel()
    assert reached == pytest.approx(0.25, abs=0.005)  # half a head in every layer
    rounded = goal_of(LLAMA_7B, **PAPER, ratio=0.5, channel_multiple=64).equal_counts
    assert (rounded["heads"], rounded["channels"]) == (13, 4480)


@for_any(100)
def test_counts_never_grow_on_the_way_and_end_exactly(draw: random.Random) -> None:
    generator = torch.Generator().manual_seed(seed(draw))
    goal = replace(random_goal(draw, uniform=True), ratio=draw.uniform(0.05, 0.8))
    limits = goal.limits
    shape = limits.dense
    for fraction in TARGETS:
        scores = random_scores_of(shape, generator)
        shape = shape.after(
            rank(scores, shape, goal, fraction)
        )  # indexing would fail if a count grew
        (counts,) = {shape.counts[i] for i in limits.open_layers}
        for kind, multiple in limits.multiples.items():
            assert counts[kind] >= goal.equal_counts[kind]
            assert counts[kind] % multiple == 0 or counts[kind] == limits.dense.counts[0][kind]
        closed = set(range(len(shape.layers))) - set(limits.open_layers)
        assert all(shape.counts[i] == limits.dense.counts[i] for i in closed)
    assert counts == goal.equal_counts


def test_the_best_of_each_layer_by_its_own_scores_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    shape = make_shape([(6, 50)] * 5)
    goal = goal_of(shape, protected_first=1, protected_last=1, ratio=0.3)
    for levels in (None, 3, 1):  # 1: all groups are tied
        scores = random_scores_of(shape, generator, levels=levels)
        # The scale between layers is nothing.
        scores[2] = LayerScores(
            heads=scores[2]["heads"] * 1000, channels=scores[2]["channels"] / 1000
        )
        counts = goal.equal_counts
        keep = rank(scores, shape, goal, 1)
        for i, (layer, layer_keep) in enumerate(zip(scores, keep, strict=True)):
            wanted = counts if i in (1, 2, 3) else shape.counts[i]
            assert layer_keep["heads"].tolist() == keep_best(layer["heads"], wanted["heads"])
            assert layer_keep["channels"].tolist() == keep_best(
                layer["channels"], wanted["channels"]
            )
        near = 1.5 * shape.group_numel["channels"]
        assert gone(shape.after(keep), shape) == pytest.approx(0.3 * shape.linear_numel(), abs=near)


@pytest.mark.parametrize("ratio", [0.15, 0.31])  # where either kind alone would come nearer
def test_encoder_and_decoder_protect_their_own_layers_and_keep_as_many_heads_of_both_kinds(
    ratio: float,
) -> None:
    """So umt5 holds the result."""
    layers = {"num_layers": 3, "num_hidden_layers": 3, "num_decoder_layers": 2}
    shape = shape_from_config(tiny_config("t5", **layers).to_dict(), "t5")
    assert goal_of(shape, protected_first=1).limits.open_layers == [1, 2, 4]
    left = goal_of(shape, ratio=ratio).shape_at(1)
    assert left.is_uniform
    assert left.linear_numel() == pytest.approx((1 - ratio) * shape.linear_numel(), rel=0.05)
