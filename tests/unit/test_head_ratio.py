"""`prune.head_ratio`: heads and channels give different fractions, and together what `prune.ratio` asks for."""

from typing import Any

import pytest
import torch

from loraprune_ds.config import PruneConfig, Ranking, RunConfig, TrainConfig
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import build_request
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank_global, uniform_counts, uniform_goal
from loraprune_ds.pruning.target import make_limits
from tests.refusals import refuses
from tests.unit.shapes_and_scores import make_shape, random_scores_of

SHAPE = make_shape([(9, 1536)] * 10, hidden=576, head_dim=64)


def limits_of(**prune: Any) -> Limits:
    return make_limits(
        PruneConfig(**({"ratio": 0.417, "channel_multiple": 1, "protected_first": 1, "protected_last": 1} | prune)),
        SHAPE,
    )


@pytest.mark.parametrize(("head_ratio", "heads"), [(0.0, 9), (1 / 3, 6), (6 / 9, 3), (0.8, 2)])
def test_uniform_takes_so_many_heads_and_makes_up_with_channels(head_ratio: float, heads: int) -> None:
    limits = limits_of(head_ratio=head_ratio)
    goal = uniform_goal(limits, 0.417)
    assert goal["heads"] == heads
    reached = 8 * limits.lost(1, goal) / SHAPE.linear_numel()
    assert abs(reached - 0.417) < 8 * SHAPE.group_numel("channels") / SHAPE.linear_numel()
    halfway = uniform_counts(limits, 0.2085, 0.417)
    assert abs((9 - halfway["heads"]) - (9 - heads) / 2) <= 0.5


@pytest.mark.parametrize("head_ratio", [0.0, 0.25, 0.75])
def test_global_splits_its_budget_so(head_ratio: float) -> None:
    limits = limits_of(head_ratio=head_ratio, ranking="global")
    scores = random_scores_of(SHAPE, torch.Generator().manual_seed(0))
    left = SHAPE.after(rank_global(scores, SHAPE, limits, 0.417))
    assert abs(sum(9 - layer["heads"] for layer in left.layers) - head_ratio * 8 * 9) <= 1
    reached = 1 - left.linear_numel() / SHAPE.linear_numel()
    assert abs(reached - 0.417) < SHAPE.group_numel("channels") / SHAPE.linear_numel()


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_the_planner_knows(ranking: Ranking) -> None:
    prune = PruneConfig(
        ratio=0.4, channel_multiple=1, head_ratio=0.2, ranking=ranking, protected_first=0, protected_last=0
    )
    config = RunConfig(output_dir="unused", prune=prune, train=TrainConfig(steps=20, global_batch_size=8))
    shape = build_request("small", {}, SHAPE, config, Cluster(1, 1)).shape_at(0.4)
    assert {layer["heads"] for layer in shape.layers} == {7}
    assert abs(1 - shape.linear_numel() / SHAPE.linear_numel() - 0.4) < 0.01


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"head_ratio": 0.9, "ratio": 0.1}, r"prune.head_ratio 0.9 with prune.ratio 0.1 would take -\d+"),
        ({"head_ratio": 0.0, "ratio": 0.75}, r"prune.head_ratio 0.0 with prune.ratio 0.75 would take 1\d\d"),
        ({"head_ratio": 0.9, "tensor_parallel": 3}, "is more of the heads than may go: 66.7%"),
        ({"head_ratio": 0.0, "channel_multiple": 900}, r"take 78\.2% of the channels, of which 41\.4% may go"),
    ],
)
def test_what_cannot_be_is_refused(prune: dict[str, Any], message: str) -> None:
    refuses(message, limits_of, **prune)
