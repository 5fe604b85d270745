"""Whole layers: which may leave, how many, what widths give beside them, and the layers with the least influence."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.config import PruneConfig, Ranking
from loraprune_ds.model.shapes import LayerShape, ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.costs import cut_cost
from loraprune_ds.plan.request import make_request
from loraprune_ds.plan.stages import split_state
from loraprune_ds.pruning.depth import BlockInfluence, least_influential
from loraprune_ds.pruning.ranking import rank_global, rank_uniform, shape_of_uniform, uniform_goal
from loraprune_ds.pruning.step import all_groups
from loraprune_ds.pruning.target import make_limits, measure, plan_sizes
from loraprune_ds.units import Amount, read_amount
from tests.refusals import refuses
from tests.unit.shapes_and_scores import LLAMA_7B, gone, random_scores_of


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"depth_ratio": 0.01}, r"prune.depth_ratio 0.01 of 32 layers is less than half a layer"),
        (
            {"depth_ratio": 0.97, "protected_last": 2},
            r"prune.depth_ratio 0.97 of 32 layers is 31, and at most 29 may leave; layer 0, protected",
        ),
        ({"depth_ratio": 0.5, "ratio": 0.4}, r"prune.ratio 0.4 is less than .*prune.depth_ratio take: 0.5"),
        ({"depth_ratio": 0.5, "target": "5B"}, r"prune.depth_ratio 0.5 alone takes more than prune.target 5B asks"),
        ({"depth_ratio": 0.25, "sizes": ["0.2", "0.5"]}, r"prune.sizes: 0.2 removes no more than prune.depth_ratio"),
        ({"depth_ratio": 0.25, "ratio": 0.999}, r"prune.ratio 0.999 is out of reach: .* at most 0.98\d+ can go"),
    ],
)
def test_layers_that_cannot_leave_are_refused(prune: dict[str, Any], message: str) -> None:
    refuses(message, lambda: plan_sizes(config := PruneConfig(**prune), make_limits(config, LLAMA_7B)))


def without(shape: ModelShape, count: int) -> ModelShape:
    return shape.without(range(3, 3 + count))


@pytest.mark.parametrize("head_ratio", [None, 0.1])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_widths_give_the_rest(ranking: Ranking, head_ratio: float | None) -> None:
    config = PruneConfig(ratio=0.4, depth_ratio=0.25, ranking=ranking, head_ratio=head_ratio)
    limits = make_limits(config, LLAMA_7B)
    scores = random_scores_of(shape := without(LLAMA_7B, 8), torch.Generator().manual_seed(0))
    if ranking == "uniform":
        keep = rank_uniform(scores, shape, limits, uniform_goal(limits, 0.4))
    else:
        keep = rank_global(scores, shape, limits, 0.4)
    after, numel = shape.after(keep), LLAMA_7B.linear_numel()
    assert after.present == shape.present
    step = limits.open_numel["channels"] * 64 if ranking == "uniform" else limits.step_numel("heads")
    assert abs(gone(after, LLAMA_7B) - 0.4 * numel) <= step
    heads = sum(layer["heads"] for layer in after.layers) / sum(layer["heads"] for layer in shape.layers)
    # Without a ratio of their own, heads lose the same part as channels: 0.15 of the 0.75 that are left.
    assert 1 - heads == pytest.approx(0.1 if head_ratio else 0.15 / 0.75, abs=0.02)
    if ranking == "uniform":  # as planned: any eight layers leave the same
        found, expected = (sorted(tuple(x.items()) for x in s.layers) for s in (after, shape_of_uniform(limits)))
        assert found == expected


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("target", ["4B", "9GiB"])
def test_a_target_counts_the_layers_that_leave(target: str, ranking: Ranking) -> None:
    config = PruneConfig(target=target, depth_ratio=0.1, ranking=ranking)
    limits, amount = make_limits(config, LLAMA_7B), read_amount(target, "prune.target")
    shape = without(LLAMA_7B, 3)
    scores = random_scores_of(shape, torch.Generator().manual_seed(0))
    if ranking == "uniform":
        keep = rank_uniform(scores, shape, limits, uniform_goal(limits, limits.ratio))
    else:
        keep = rank_global(scores, shape, limits, limits.ratio)
    # A step of `uniform` is a head in each layer, 0.9 % of the model.
    assert measure(config, shape.after(keep), cast(Amount, amount)) == pytest.approx(amount.value, rel=0.01)


class Turn(nn.Module):
    """Turns a hidden state of two numbers by an angle."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        angle = torch.tensor(degrees).deg2rad()
        self.matrix = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 3 * hidden_states @ self.matrix


def test_the_influence_is_what_a_layer_turns_and_padding_does_not_count() -> None:
    layers = nn.ModuleList([Turn(90), Turn(60), Turn(0)])
    shape = SimpleNamespace(present=[0, 1, 2])
    model: Any = SimpleNamespace(layers=layers, shape=shape, device="cpu", sum_over_ranks=lambda values: 2 * values)
    influence = BlockInfluence(model, decay=0.5)
    mask, hidden = torch.tensor([[True, True, False]]), torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0))
    hidden[0, 2] = 0  # has no direction: it would count as a whole turn
    for _ in range(2):
        with influence.record_step():
            for _ in range(2):
                with influence.record_forward(mask):
                    for layer in layers:
                        layer(hidden_states=hidden) if layer is layers[1] else layer(hidden)
                layers[2](-hidden)  # a second forward, as of activation checkpointing
    assert influence.average is not None
    assert influence.average.tolist() == pytest.approx([0.75 * 1, 0.75 * 0.5, 0], abs=1e-6)


def test_the_layer_with_the_least_influence_leaves() -> None:
    influence = torch.tensor([0.0, 0.3, 0.1, 0.1, 0.2])
    shape = LLAMA_7B.with_layers(LLAMA_7B.layers[:5])
    gone_layers = list[int]()
    for _ in range(3):
        least = least_influential(influence, [1, 2, 3], shape)  # layer 0 never is in there
        keep = all_groups(shape.without([least]))
        after = shape.after(keep)
        gone_layers += set(shape.present) - set(after.present)
        assert all(after.layers[i] == shape.layers[i] for i in after.present)
        assert all(after.layers[i] == LayerShape(heads=0, channels=0) for i in gone_layers)
        shape = after
    assert gone_layers == [2, 3, 1]


def test_the_plan_is_exact_whichever_layers_leave() -> None:
    prune = {"ratio": 0.4, "depth_ratio": 0.1, "ranking": "uniform", "protected_first": 0, "protected_last": 0}
    overrides = ["train.epochs=null", "train.steps=200", *(f"prune.{key}={value}" for key, value in prune.items())]
    request = make_request("llama-7b", Cluster(1, 4), overrides=overrides)
    schedule, dense = request.pruning.schedule, request.shape
    for step, left in ((schedule.drops[0], 31), (schedule.drops[-1], 29), (request.steps, 29)):
        planned = request.shape_at(step)
        assert len(planned.present) == left
        counts = planned.layers[1]
        layers = dense.without(range(5, 5 + len(dense.layers) - left)).layers
        other = dense.with_layers(tuple(counts if layer.kinds else layer for layer in layers))
        assert other.present != planned.present
        assert split_state(request, other) == split_state(request, planned)
        assert other.linear_numel() == planned.linear_numel()
    assert request.shape_at(request.steps) == shape_of_uniform(request.pruning.limits)
    first = schedule.drops[0]
    assert sum(cut_cost(request, dense, request.shape_at(first)).sent.values()) == 0  # a layer just leaves
