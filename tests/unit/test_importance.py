"""Scores of groups against the oracle, from weights split over simulated ranks."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import Criterion, Normalization
from loraprune_ds.errors import RunError
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.importance import LayerScores, MovingAverage, random_scores
from tests.oracle import formula
from tests.unit.shapes_and_scores import make_shape
from tests.unit.split_model import LayerTensors, random_layer, scores_over_ranks

FP32 = 1e-5  # relative to the largest score, as in test_criterion
SCALING, RANK = 2.5, 3
SHAPES = {
    "mha": make_shape([(4, 19), (4, 19)], hidden=13, head_dim=3),
    "gqa": make_shape([(3, 17), (3, 17)], hidden=11, head_dim=5, queries_per_group=3),
    "layers_differ": make_shape([(3, 17), (1, 1), (2, 30)], hidden=11, head_dim=2, queries_per_group=2),
}


@dataclass(frozen=True)
class Run:
    """Two steps' tensors: only the gradients change, as in training they would mostly."""

    shape: ModelShape
    steps: list[list[LayerTensors]]

    def package(
        self, *, world_size: int = 1, criterion: Criterion = "lora", normalization: Normalization = "l2"
    ) -> list[LayerScores]:
        """The moving average after the last step."""
        average = MovingAverage(0.9)
        options: dict[str, Any] = {"scaling": SCALING, "criterion": criterion, "normalization": normalization}
        for layers in self.steps:
            average.update(scores_over_ranks(self.shape, layers, world_size=world_size, **options))
        assert average.scores is not None
        return average.scores

    def oracle(self, *, power: int = 1, normalize: bool = True) -> list[tuple[Tensor, Tensor]]:
        averages = []
        for i, layer in enumerate(self.shape.layers):
            heads, channels = (torch.zeros(layer[kind], dtype=torch.float64) for kind in ("heads", "channels"))
            for layers in self.steps:
                sizes = (layer["heads"], self.shape.queries_per_group, self.shape.head_dim)
                now = formula.group_scores(layers[i], SCALING, *sizes, normalize=normalize, power=power)
                heads = formula.moving_average(heads, now[0], 0.9)
                channels = formula.moving_average(channels, now[1], 0.9)
            averages.append((heads, channels))
        return averages


def random_run(shape: ModelShape, seed: int = 0) -> Run:
    generator = torch.Generator().manual_seed(seed)
    first, second = ([random_layer(shape, i, RANK, generator) for i in range(len(shape.layers))] for _ in range(2))
    later = [{x: (*a[x][:3], *b[x][3:]) for x in a} for a, b in zip(first, second, strict=True)]  # W, A, B of the first
    return Run(shape, [first, later])


def assert_same(found: list[LayerScores], expected: list[tuple[Tensor, Tensor]]) -> None:
    for layer, (heads, channels) in zip(found, expected, strict=True):
        for scores, oracle in ((layer["heads"], heads), (layer["channels"], channels)):
            assert scores.dtype == torch.float64
            assert scores.shape == oracle.shape
            assert (scores - oracle).abs().max() <= FP32 * oracle.max()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 9])
def test_scores_are_the_oracles_on_any_number_of_ranks(name: str, world_size: int) -> None:
    run = random_run(SHAPES[name])
    cases: list[tuple[Criterion, Normalization]] = [("lora", "l2"), ("lora", "none"), ("lora_squared", "l2")]
    for criterion, normalization in cases:
        found = run.package(world_size=world_size, criterion=criterion, normalization=normalization)
        power = 2 if criterion == "lora_squared" else 1
        assert_same(found, run.oracle(power=power, normalize=normalization == "l2"))


@pytest.mark.parametrize(("bad", "name"), [(math.nan, "self_attn.q_proj"), (math.inf, "mlp.down_proj")])
def test_a_score_that_is_not_finite_names_layer_linear_and_step(bad: float, name: str) -> None:
    run = random_run(SHAPES["gqa"])
    run.steps[0][1][name][4][0, 0] = bad  # gB
    with pytest.raises(RunError, match=rf"^step 1: the score of layer 1 {name} is not finite$"):
        run.package(world_size=2)


def test_a_module_without_any_score_is_not_divided_by_its_norm() -> None:
    run = random_run(SHAPES["gqa"])
    for layers in run.steps:
        weight, a, b, grad_a, grad_b = layers[0]["self_attn.v_proj"]
        layers[0]["self_attn.v_proj"] = (weight * 0, a, b * 0, grad_a, grad_b)
    assert_same(run.package(normalization="l2"), run.oracle(normalize=True))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 50.0, 0.0])
def test_each_step_counts_alike(world_size: int, factor: float) -> None:
    """Though the gradients of one step are larger, or zero. Layers still compare: all have one divisor."""
    run = random_run(SHAPES["layers_differ"])
    for layer in run.steps[1]:
        for name, (weight, a, b, grad_a, grad_b) in layer.items():
            layer[name] = (weight, a, b, factor * grad_a, factor * grad_b)
    expected = [(0 * heads, 0 * channels) for heads, channels in run.oracle()]
    for layers in run.steps:
        now = Run(run.shape, [layers]).oracle(normalize=False)
        total = sum(float(heads.sum() + channels.sum()) for heads, channels in now) or 1.0
        expected = [
            (0.9 * a + 0.1 * c / total, 0.9 * b + 0.1 * d / total) for (a, b), (c, d) in zip(expected, now, strict=True)
        ]
    assert_same(run.package(world_size=world_size, normalization="step"), expected)


def test_random_scores_are_one_draw_per_group() -> None:
    shape = make_shape([(4, 30), (4, 30), (2, 5)])
    first, again, other = random_scores(shape, 1), random_scores(shape, 1), random_scores(shape, 2)
    assert [(len(s["heads"]), len(s["channels"])) for s in first] == [(4, 30), (4, 30), (2, 5)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in ("heads", "channels"))
    assert not torch.equal(first[0]["channels"], other[0]["channels"])
    assert not torch.equal(first[0]["channels"], first[1]["channels"])  # layers draw their own
