"""Scores of elements and of groups against the oracle, from weights split over simulated ranks."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import Normalization
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard
from loraprune_ds.pruning.importance import MovingAverage, score_groups
from loraprune_ds.pruning.layer_scores import LayerScores, random_scores
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from loraprune_ds.ranks.flat import partition_numel
from loraprune_ds.zero.params import owned_flat
from tests.oracle import formula
from tests.refusals import must_name
from tests.unit.shapes_and_scores import make_shape

# Weights split over simulated ranks in one process, every padding poisoned with NaN

LayerTensors = dict[str, formula.LoraLinear]  # by linear: W, A, B, gA, gB
SCALING, RANK = 2.5, 3


def owned_shard(weight: Tensor, world_size: int, rank: int) -> OwnedShard:
    """What `rank` owns of a weight, as the package reads it from a ZeRO-3 parameter."""
    size = partition_numel(weight.numel(), world_size)
    padded = torch.cat([weight.reshape(-1), weight.new_full((size * world_size - weight.numel(),), float("nan"))])
    parameter: Any = torch.empty(0)
    parameter.ds_numel, parameter.ds_tensor = weight.numel(), padded[rank * size : (rank + 1) * size]
    flat, start = owned_flat(parameter, world_size, rank)
    return OwnedShard(flat, start, (weight.shape[0], weight.shape[1]))


@dataclass
class SplitModel:
    """One rank of the simulated ranks; `total`, once known, is what the all-reduce returns."""

    shape: ModelShape
    layers: list[LayerTensors]
    world_size: int
    rank: int
    total: Tensor | None = None
    partial: Tensor | None = None

    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        for layer in self.layers:
            yield {name: LoraFactors(*t[1:], scaling=SCALING) for name, t in layer.items()}

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        return owned_shard(self.layers[linear_id.layer][linear_id.name][0], self.world_size, self.rank)

    def all_reduce(self, values: Tensor) -> Tensor:
        self.partial = values
        return values if self.total is None else self.total


def scores_over_ranks(
    shape: ModelShape, layers: list[LayerTensors], world_size: int, normalization: Normalization
) -> list[LayerScores]:
    """The scores that every one of `world_size` ranks arrives at."""

    def score(rank: int, total: Tensor | None = None) -> tuple[Any, list[LayerScores]]:
        model: Any = SplitModel(shape, layers, world_size, rank, total)
        model.comm = model
        sums = score_groups(model, "lora", step=1)
        sums.check()
        return model, sums.by_layer(normalization)

    total = torch.stack([score(rank)[0].partial for rank in range(world_size)]).sum(0)
    return score(0, total)[1]


# Elements

FP32 = 1e-5  # relative to the largest sum: fp32 products of up to 23 terms whose parts cancel, summed in fp64


def random_linear(
    generator: torch.Generator, shape: tuple[int, int], r: int, scaling: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, LoraFactors]:
    """Returns a weight and its LoRA."""
    rows, columns = shape
    sizes = ((rows, columns), (r, columns), (rows, r), (r, columns), (rows, r))
    weight, *factors = (torch.randn(size, generator=generator, dtype=dtype) for size in sizes)
    return weight, LoraFactors(*factors, scaling=scaling)


def oracle(name: str, weight: Tensor, factors: LoraFactors) -> Tensor:
    weight, a, b = weight.double(), factors.A.double(), factors.B.double()
    if name == "lora":
        gradients = factors.grad_A.double(), factors.grad_B.double()
        return formula.element_importance(weight, a, b, *gradients, factors.scaling)
    return (weight + factors.scaling * b @ a).abs()


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= FP32 * expected.abs().max())


@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.5])
@pytest.mark.parametrize("name", ELEMENT_CRITERIA)
def test_criteria_are_the_oracles_in_fp64(name: str, scaling: float) -> None:
    for shape, r in (((9, 6), 3), ((3, 11), 4), ((1, 1), 2)):
        weight, factors = random_linear(torch.Generator().manual_seed(1), shape, r, scaling, torch.float64)
        found = ELEMENT_CRITERIA[name](weight.clone(), factors).abs()
        torch.testing.assert_close(found, oracle(name, weight, factors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 17])
def test_partial_sums_add_up_to_the_sums_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(criterion, "CPU_BLOCK_NUMEL", block)
    draw, generator = random.Random(block), torch.Generator().manual_seed(block)
    for _ in range(1000):
        shape, r, world_size = (draw.randint(1, 23), draw.randint(1, 23)), draw.randint(1, 4), draw.randint(1, 9)
        weight, factors = random_linear(generator, shape, r, draw.choice([0.5, 1.0, 2.0]))
        axis, name = draw.randint(0, 1), draw.choice(["lora", "magnitude"])
        total = torch.zeros(shape[axis], dtype=torch.float64)
        for rank in range(world_size):
            part = score_shard(owned_shard(weight, world_size, rank), factors, ELEMENT_CRITERIA[name], axis)
            assert (part.dtype, part.shape) == (torch.float64, total.shape)
            total += part
        assert close(total, oracle(name, weight, factors).sum(1 - axis)), (shape, world_size, axis, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_scored_in_fp32_and_left_alone(dtype: torch.dtype) -> None:
    weight, factors = random_linear(torch.Generator().manual_seed(2), (12, 9), 2, 2.0)
    weight = weight.to(dtype)
    given = (weight, factors.A, factors.B, factors.grad_A, factors.grad_B)
    before = [t.clone() for t in given]
    for name, element in ELEMENT_CRITERIA.items():
        shard = owned_shard(weight, 1, 0)
        flat = shard.flat.clone()
        sums = score_shard(shard, factors, element, 1)
        assert torch.equal(shard.flat, flat), name
        assert close(sums, oracle(name, weight, factors).sum(0)), name
        assert all(torch.equal(b, a) for b, a in zip(before, given, strict=True)), name


# Scores of groups

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

    def package(self, *, world_size: int = 1, normalization: Normalization = "l2") -> list[LayerScores]:
        """The moving average after the last step."""
        average = MovingAverage(0.9)
        for layers in self.steps:
            average.update(scores_over_ranks(self.shape, layers, world_size, normalization))
        assert average.scores is not None
        return average.scores

    def oracle(self, *, normalize: bool = True) -> list[tuple[Tensor, Tensor]]:
        averages = []
        for i, layer in enumerate(self.shape.counts):
            heads, channels = (torch.zeros(layer[kind], dtype=torch.float64) for kind in ("heads", "channels"))
            for layers in self.steps:
                sizes = (layer["heads"], self.shape.attention[i].queries // layer["heads"], self.shape.head_dim)
                now = formula.group_scores(layers[i], SCALING, *sizes, normalize=normalize)
                heads = formula.moving_average(heads, now[0], 0.9)
                channels = formula.moving_average(channels, now[1], 0.9)
            averages.append((heads, channels))
        return averages


def random_run(shape: ModelShape) -> Run:
    """Every term of the criterion has a say: B and gB·gA are as large as the rest."""
    generator = torch.Generator().manual_seed(0)

    def random_layer(i: int) -> LayerTensors:
        sizes = {linear.linear: linear.matrix for linear in shape.layers[i].linears}
        drawn = {name: random_linear(generator, size, RANK, SCALING) for name, size in sizes.items()}
        return {name: (weight, f.A, f.B, f.grad_A, f.grad_B) for name, (weight, f) in drawn.items()}

    first, second = ([random_layer(i) for i in range(len(shape.layers))] for _ in range(2))
    later = [{x: (*a[x][:3], *b[x][3:]) for x in a} for a, b in zip(first, second, strict=True)]  # W, A, B of the first
    return Run(shape, [first, later])


def assert_same(found: list[LayerScores], expected: list[tuple[Tensor, Tensor]]) -> None:
    for layer, (heads, channels) in zip(found, expected, strict=True):
        for scores, oracle in ((layer["heads"], heads), (layer["channels"], channels)):
            assert scores.dtype == torch.float64
            assert scores.shape == oracle.shape
            assert (scores - oracle).abs().max() <= FP32 * oracle.max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 9])
def test_scores_are_the_oracles_on_any_number_of_ranks(shape: str, world_size: int) -> None:
    run = random_run(SHAPES[shape])
    cases: list[Normalization] = ["l2", "none"]
    for normalization in cases:
        found = run.package(world_size=world_size, normalization=normalization)
        assert_same(found, run.oracle(normalize=normalization == "l2"))


@pytest.mark.parametrize(("bad", "name"), [(math.nan, "self_attn.q_proj"), (math.inf, "mlp.down_proj")])
def test_a_score_that_is_not_finite_names_layer_linear_and_step(bad: float, name: str) -> None:
    run = random_run(SHAPES["gqa"])
    run.steps[0][1][name][4][0, 0] = bad  # gB
    must_name(f"step 1 layer 1 {name}", run.package, world_size=2)


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
        pairs = zip(expected, now, strict=True)
        expected = [(0.9 * a + 0.1 * c / total, 0.9 * b + 0.1 * d / total) for (a, b), (c, d) in pairs]
    assert_same(run.package(world_size=world_size, normalization="step"), expected)


def test_random_scores_are_one_draw_per_group() -> None:
    shape = make_shape([(4, 30), (4, 30), (2, 5)])
    first, again, other = random_scores(shape, 1), random_scores(shape, 1), random_scores(shape, 2)
    assert [(len(s["heads"]), len(s["channels"])) for s in first] == [(4, 30), (4, 30), (2, 5)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in ("heads", "channels"))
    assert not torch.equal(first[0]["channels"], other[0]["channels"])
    assert not torch.equal(first[0]["channels"], first[1]["channels"])  # layers draw their own
