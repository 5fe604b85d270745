"""The limits of pruning: protected layers, floors, and a bound on the ratio that really can be reached."""

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Ranking
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.limits import Limits, make_limits
from loraprune_ds.pruning.ranking import rank
from tests.support.families import tiny_config
from tests.support.paper import OPEN, PAPER
from tests.support.properties import for_any, seed
from tests.support.published import PUBLISHED
from tests.support.refusals import must_name, refused
from tests.support.shapes_and_scores import (
    SMOLLM2,
    gone,
    make_shape,
    random_scores_of,
    random_shape,
)


def limits_of(shape: ModelShape, **prune: Any) -> Limits:
    config = PruneConfig(**PAPER | {"ratio": 0.1, "channel_multiple": 1, **prune})
    return make_goal(config, shape).limits


@pytest.mark.parametrize(
    ("layers", "prune", "protected"),
    [
        (3, {}, [0, 2]),
        (10, {}, [0, 9]),
        (11, {}, [0, 1, 10]),
        (30, {}, [0, 1, 2, 29]),
        (32, {}, [0, 1, 2, 3, 31]),
        (70, {}, [*range(7), 69]),
        (4, OPEN, []),
        (30, {"protected_first": 2, "protected_last": 3}, [0, 1, 27, 28, 29]),
    ],
)
def test_first_tenth_and_last_layer_are_protected(
    layers: int, prune: dict[str, int], protected: list[int]
) -> None:
    limits = limits_of(make_shape([(4, 40)] * layers), **prune)
    assert limits.open_layers == [i for i in range(layers) if i not in protected]
    for i in protected:
        assert limits.floor[i] == limits.dense.counts[i]


def test_floors_are_multiples() -> None:
    prune = OPEN | {"tensor_parallel": 2, "channel_multiple": 33}
    limits = limits_of(make_shape([(4, 200), (4, 100), (2, 66)]), ranking="global", **prune)
    assert [tuple(layer.values()) for layer in limits.floor] == [(2, 66), (2, 66), (2, 66)]


@pytest.mark.parametrize(
    ("layer", "prune", "names"),
    [
        ((4, 48), {}, "prune.channel_multiple 64 layer 1 48"),
        (
            (16, 160),
            {"channel_multiple": 25, "tensor_parallel": 16},
            "prune.tensor_parallel 16 400 160",
        ),
        ((3, 128), {"tensor_parallel": 2}, "prune.tensor_parallel 2 3 heads layer 0"),
        ((4, 130), {"tensor_parallel": 4}, "prune.tensor_parallel 4 130 channels layer 0"),
    ],
)
def test_too_large_a_multiple_is_refused(
    layer: tuple[int, int], prune: dict[str, Any], names: str
) -> None:
    """Layers 0 and 2 are protected. A server has to divide what they keep, too, and the channels of an expert."""
    must_name(
        names, make_goal, PruneConfig(**PAPER | {"ratio": 0.01, **prune}), make_shape([layer] * 3)
    )
    mixture = shape_from_config(tiny_config("mixtral").to_dict(), "mixtral")  # 8 channels, 5 heads
    must_name(
        "prune.tensor_parallel 5 8 expert", make_goal, PruneConfig(tensor_parallel=5), mixture
    )
    common = PruneConfig(**PAPER | {"ratio": 0.01, "channel_multiple": 96, "tensor_parallel": 4})
    assert make_limits(common, make_shape([(4, 128)] * 3)).multiples == {"heads": 4, "channels": 96}


# The ratio that can be reached


def random_config(draw: random.Random, ranking: Ranking, shape: ModelShape) -> PruneConfig:
    narrowest, heads = (
        min(layer[kind] for layer in shape.counts) for kind in ("channels", "heads")
    )
    pairs = (
        all(layer["heads"] % 2 == layer["channels"] % 2 == 0 for layer in shape.counts)
        and heads > 1
    )
    return PruneConfig(
        ratio=0.999999,
        ranking=ranking,
        protected_first=draw.choice([0, 0, 1, 2]),
        protected_last=draw.choice([0, 0, 1]),
        channel_multiple=draw.choice(
            [1, 1, *(multiple for multiple in (4, 16) if multiple <= narrowest)]
        ),
        tensor_parallel=draw.choice([1, 2]) if pairs else 1,
    )


def largest_ratio(config: PruneConfig, shape: ModelShape) -> float:
    """The one that the error of an unreachable ratio states."""
    stated = re.search(
        r"out of reach.* at most ([\d.e-]+) can leave$", refused(make_goal, config, shape)
    )
    assert stated
    return float(stated[1])


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@for_any(150)
def test_the_stated_ratio_is_reached_whatever_the_scores(
    ranking: Ranking, draw: random.Random
) -> None:
    shape = random_shape(draw, uniform=ranking == "uniform")
    config = random_config(draw, ranking, shape)
    assume(config.protected_last + (config.protected_first or 0) < len(shape.layers))
    most = largest_ratio(config, shape)
    assume(most > 0)
    generator = torch.Generator().manual_seed(seed(draw))
    goal = make_goal(replace(config, ratio=most), shape)
    limits = goal.limits
    pruned = shape.after(rank(random_scores_of(shape, generator), shape, goal, 1))
    steps = {
        kind: multiple * shape.group_numel[kind] for kind, multiple in limits.multiples.items()
    }
    step = (
        len(limits.open_layers) * steps["channels"] / 2 if limits.uniform else max(steps.values())
    )
    # The stated ratio has four digits, rounded down.
    short = most * shape.linear_numel() - gone(pruned, shape)
    assert short <= step + 1e-9, (config, shape)
    assert goal.shortfall(pruned) is None


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_a_ratio_above_it_is_refused_and_an_end_far_below_is_told(ranking: Ranking) -> None:
    """Not only the absurd one: anything further off than what either ranking promises to come within."""
    prune = {"ranking": ranking, "protected_first": 1, "protected_last": 0}
    most = largest_ratio(PruneConfig(ratio=0.99, channel_multiple=1, **prune), SMOLLM2)
    head, channel = SMOLLM2.group_numel["heads"], SMOLLM2.group_numel["channels"]
    exact = 29 * (2 * head + 1535 * channel) / SMOLLM2.linear_numel()
    assert most == pytest.approx(exact, abs=1e-4)
    make_goal(PruneConfig(channel_multiple=1, ratio=most, **prune), SMOLLM2)
    more = PruneConfig(channel_multiple=1, ratio=most + 0.005, **prune)
    must_name(f"prune.ratio {most}", make_goal, more, SMOLLM2)
    nothing = {"ratio": 1e-9, "channel_multiple": 1536, "tensor_parallel": 3}
    must_name("prune.ratio 0.0", limits_of, SMOLLM2, ranking=ranking, **nothing)
    must_name(
        "prune.protected_first prune.protected_last 30",
        limits_of,
        SMOLLM2,
        ranking=ranking,
        protected_first=29,
    )
    asked, reached = (
        make_goal(PruneConfig(ratio=x, ranking=ranking, channel_multiple=1), SMOLLM2)
        for x in (0.37, 0.188)
    )
    line = asked.shortfall(reached.shape_at(1))
    assert line is not None
    assert "18.8 %" in line
    assert "37.0 %" in line


def test_open_layers_that_lack_a_kind_are_one_line() -> None:
    gemma = shape_from_config(PUBLISHED["gemma4-31b"][0]["text_config"], "gemma")  # keeps all heads
    must_name("prune.ranking uniform", make_goal, PruneConfig(ranking="global"), gemma)
    sparse_last = shape_from_config(tiny_config("glm4_moe_lite").to_dict(), "glm")
    without_experts = OPEN | {"protected_last": 1, "ratio": 0.6, "head_ratio": 0.1}
    must_name(
        "prune.ratio 0.6 prune.head_ratio 0.1",
        make_goal,
        PruneConfig(**without_experts),
        sparse_last,
    )


def test_channels_that_cannot_go_excuse_no_ratio() -> None:
    """A floor at the width keeps all channels: what the heads alone give is the most."""
    prune = OPEN | {"channel_multiple": 1536}
    most = 30 * 2 * SMOLLM2.group_numel["heads"] / SMOLLM2.linear_numel()
    limits_of(SMOLLM2, ratio=most, **prune)
    must_name("prune.ratio", limits_of, SMOLLM2, ratio=most + 0.001, **prune)


def test_uniform_refuses_layers_of_different_shapes() -> None:
    shape = make_shape([(4, 40), (4, 40), (3, 40), (4, 40)])
    must_name("prune.ranking uniform global", limits_of, shape)
    limits_of(shape, ranking="global")
    limits_of(make_shape([(3, 40), (4, 40), (4, 40), (2, 7)]))  # only protected layers differ
