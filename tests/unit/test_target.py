"""`prune.target`: parameters or a server's memory instead of a ratio. `prune.head_ratio`: heads and channels apart."""

import re
from typing import Any

import pytest
import torch

from loraprune_ds.config import PruneConfig, RunConfig, TrainConfig
from loraprune_ds.config_types import Ranking
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import build_request
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.goal import Goal, make_goal
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.ranking import rank
from loraprune_ds.pruning.target import describe_target, measure, server_memory
from tests.support.families import EQUAL, MIXTURES, tiny_config
from tests.support.paper import FREE, PAPER
from tests.support.refusals import must_name, refused
from tests.support.shapes_and_scores import (
    LLAMA_7B,
    SMOLLM2,
    cut_to,
    goal_of,
    gone,
    make_shape,
    random_scores_of,
)

GIB = 2**30
LIMITS: list[dict[str, Any]] = [{}, {"channel_multiple": 1}, {"channel_multiple": 128}]


def uniform_step(
    shape: ModelShape, prune: dict[str, Any], of_weight: float = 1, of_a_head: float = 0
) -> float:
    """Returns the size that leaves with one step of the channels in all open layers, plus that of a head."""
    limits = make_limits(PruneConfig(**(PAPER | prune | {"target": "1GiB"})), shape)
    step = limits.multiples["channels"] * shape.group_numel["channels"]
    return len(limits.open_layers) * (step * of_weight + of_a_head)


@pytest.mark.parametrize("shape", [LLAMA_7B, SMOLLM2], ids=["llama-7b", "smollm2"])
@pytest.mark.parametrize("part", [0.55, 0.75, 0.95])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_uniform_ends_a_step_below_so_many_parameters(
    shape: ModelShape, part: float, limits: dict[str, Any]
) -> None:
    target = round(part * shape.total_numel())
    reached = cut_to(shape, target=str(target), **limits).total_numel()
    assert 0 <= target - reached <= uniform_step(shape, limits)


def test_tensor_parallel_and_head_ratio_hold_with_a_target() -> None:
    prune = {"tensor_parallel": 4, "channel_multiple": 64, "head_ratio": 0.25}
    pruned = cut_to(LLAMA_7B, target="5B", **prune)
    layer = pruned.counts[10]
    assert (layer["heads"], layer["channels"] % 64) == (24, 0)
    assert 0 <= 5e9 - pruned.total_numel() <= uniform_step(LLAMA_7B, prune)


def test_global_ends_within_one_group_of_so_many_parameters() -> None:
    shape = make_shape([(8, 512)] * 12, hidden=64, head_dim=16, queries_per_group=2)
    step = max(64 * shape.group_numel["channels"], shape.group_numel["heads"])
    for seed in range(5):
        pruned = cut_to(shape, seed, target="1.0M", ranking="global")
        # one multiple, and half of one for heads that channels stood in for: `rank_global`
        assert abs(1e6 - pruned.total_numel()) <= 1.5 * step


@pytest.mark.parametrize("family", [x for x in MIXTURES if x not in EQUAL])
def test_global_reaches_a_target_of_experts(family: str) -> None:
    """The first layer of some has no experts."""
    shape = shape_from_config(tiny_config(family).to_dict(), family)
    target = round(0.9 * shape.total_numel())
    reached = cut_to(shape, target=str(target), ranking="global", **FREE).total_numel()
    assert abs(reached - target) <= shape.group_numel["experts"]


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("bits", [{}, {"target_weight_bits": 4.25}], ids=str)
def test_a_servers_memory_is_reached(ranking: str, bits: dict[str, float]) -> None:
    prune = {"ranking": ranking, "target_context": 4 * 8192, **bits}
    asked = 20 * GIB if not bits else 13 * GIB
    pruned = cut_to(LLAMA_7B, target=f"{asked // GIB}GiB", **prune)
    # Per layer a step of the channels, or one head more or less, weights and cache, that channels make up for.
    config = PruneConfig(target=f"{asked // GIB}GiB", **prune)
    of_a_head = 2 * 128 * 8192 * 4 * 2
    step = uniform_step(LLAMA_7B, prune, config.target_weight_bits / 8, of_a_head)
    assert config.target_amount
    distance = asked - measure(config, pruned, config.target_amount)
    assert (0 if ranking == "uniform" else -step) <= distance <= step


def test_memory_is_weights_and_cache_by_hand() -> None:
    shape = make_shape([(3, 40), (2, 20)], hidden=16, head_dim=4, queries_per_group=2)
    config = PruneConfig(target="1MiB", target_context=300, target_weight_bits=4)
    # q, o and k, v of 5 groups; gate, up, down of 60 channels
    linear = 5 * (2 * 8 + 2 * 4) * 16 + 60 * 3 * 16
    others = 2 * 50 * 16 + 16 + 4 * 16  # embedding and head, the last norm, two norms of two layers
    memory = server_memory(config, shape)
    assert memory["weights"] == linear / 2 + others * 2
    assert memory["kv_cache"] == 2 * 5 * 4 * 300 * 2


def test_the_report_tells_what_was_reached() -> None:
    assert describe_target(PruneConfig(ratio=0.3), LLAMA_7B, LLAMA_7B) is None
    pruned = cut_to(LLAMA_7B, target="10GB", target_context=2048)
    entry = describe_target(PruneConfig(target="10GB", target_context=2048), LLAMA_7B, pruned)
    assert entry is not None
    assert (entry["asked"], entry["unit"], entry["value"]) == ("10GB", "bytes", 10e9)
    assert entry["reached"] == entry["weights"] + entry["kv_cache"] <= 10e9 < entry["dense"]


@pytest.mark.parametrize(
    ("prune", "names"),
    [
        ({"target": "7B"}, "prune.target 7B 6.48"),
        ({"target": "1B"}, "prune.target 1B"),
        ({"target": "2GiB"}, "prune.target 2GiB"),
        ({"target": "6.4B", "head_ratio": 0.5}, "prune.head_ratio 0.5 prune.target 6.4B"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused(prune: dict[str, Any], names: str) -> None:
    must_name(names, make_goal, PruneConfig(**PAPER | prune), LLAMA_7B)


def test_the_smallest_size_that_a_refusal_names_can_be_reached() -> None:
    named = re.search(
        r"at least ([\d.]+) B and", refused(make_goal, PruneConfig(**PAPER, target="1B"), LLAMA_7B)
    )
    smallest = float(named.group(1))  # type: ignore[union-attr]
    make_goal(PruneConfig(**PAPER, target=f"{smallest + 0.05}B"), LLAMA_7B)


# `prune.head_ratio`: heads and channels give different fractions, and together what `prune.ratio` asks for

SHAPE = make_shape([(9, 1536)] * 10, hidden=576, head_dim=64)


def split(**prune: Any) -> Goal:
    return goal_of(SHAPE, **{"ratio": 0.417, "protected_first": 1, "protected_last": 1, **prune})


@pytest.mark.parametrize(("head_ratio", "heads"), [(0.0, 9), (1 / 3, 6), (6 / 9, 3), (0.8, 2)])
def test_uniform_takes_so_many_heads_and_makes_up_with_channels(
    head_ratio: float, heads: int
) -> None:
    goal = split(head_ratio=head_ratio)
    assert goal.equal_counts["heads"] == heads
    reached = gone(goal.shape_at(1), SHAPE) / SHAPE.linear_numel()
    assert abs(reached - 0.417) < 8 * SHAPE.group_numel["channels"] / SHAPE.linear_numel()
    halfway = goal.counts_at(0.5)
    assert abs((9 - halfway["heads"]) - (9 - heads) / 2) <= 0.5


@pytest.mark.parametrize("head_ratio", [0.0, 0.25, 0.75])
def test_global_splits_its_budget_so(head_ratio: float) -> None:
    scores = random_scores_of(SHAPE, torch.Generator().manual_seed(0))
    left = SHAPE.after(rank(scores, SHAPE, split(head_ratio=head_ratio, ranking="global"), 1))
    assert abs(sum(9 - layer["heads"] for layer in left.counts) - head_ratio * 8 * 9) <= 1
    reached = 1 - left.linear_numel() / SHAPE.linear_numel()
    assert abs(reached - 0.417) < SHAPE.group_numel["channels"] / SHAPE.linear_numel()


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_the_planner_knows(ranking: Ranking) -> None:
    prune = PruneConfig(**FREE, ratio=0.4, head_ratio=0.2, ranking=ranking)
    config = RunConfig(
        output_dir="unused", prune=prune, train=TrainConfig(steps=20, global_batch_size=8)
    )
    shape = build_request("small", {}, SHAPE, config, Cluster(1, 1)).shape_at(20)
    heads = [layer["heads"] for layer in shape.counts]
    assert max(heads) - min(heads) <= 1
    assert sum(heads) == {"uniform": 70, "global": 72}[ranking]
    assert abs(1 - shape.linear_numel() / SHAPE.linear_numel() - 0.4) < 0.01


@pytest.mark.parametrize(
    ("prune", "names"),
    [
        ({"head_ratio": 0.8, "ratio": 0.1}, "prune.ratio 0.1 0.2134"),
        ({"head_ratio": 0.0, "ratio": 0.75}, "prune.ratio 0.75"),
        ({"head_ratio": 0.9, "tensor_parallel": 3}, "0.6666"),
        ({"head_ratio": 0.0, "channel_multiple": 900}, "prune.ratio 0.417 0.0 0.2208"),
    ],
)
def test_what_cannot_be_is_refused(prune: dict[str, Any], names: str) -> None:
    must_name(f"prune.head_ratio {prune['head_ratio']} {names}", split, **prune)


def test_a_delta_net_has_a_state_in_place_of_a_cache() -> None:
    """fp32, key by value for each of 10 value heads, and for any number of tokens. The other layer has a cache."""
    shape = shape_from_config(tiny_config("qwen3_5_text").to_dict(), "somewhere")
    config, state, per_token = (
        PruneConfig(target="1MiB", target_context=100),
        10 * 10 * 8,
        2 * 5 * 12,
    )
    assert server_memory(config, shape)["kv_cache"] == 2 * per_token * 100 + 4 * state
