"""A made-up model whose weights are split over simulated ranks in one process, every padding poisoned with NaN."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import Criterion, Normalization
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.importance import LayerScores, score_groups
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from loraprune_ds.zero.flat import partition_numel
from loraprune_ds.zero.params import owned_flat
from tests.oracle.formula import LoraLinear

LayerTensors = dict[str, LoraLinear]  # by linear: W, A, B, gA, gB


def random_layer(
    shape: ModelShape, layer: int, r: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> LayerTensors:
    """One decoder layer in which every term of the criterion has a say: B and gB·gA are as large as the rest."""
    tensors = {}
    for linear in LLAMA_LINEARS:
        out_features, in_features = shape.linear_shape(layer, linear)
        sizes = ((out_features, in_features), (r, in_features), (out_features, r), (r, in_features), (out_features, r))
        weight, *factors = (torch.randn(size, generator=generator) for size in sizes)
        tensors[linear.name] = (weight.to(dtype), *factors)
    return tensors


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
    scaling: float
    world_size: int = 1
    rank: int = 0
    total: Tensor | None = None
    partial: Tensor | None = None

    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        for layer in self.layers:
            yield {name: LoraFactors(*t[1:], scaling=self.scaling) for name, t in layer.items()}

    def owned_weight(self, layer: int, linear: Linear) -> OwnedShard:
        return owned_shard(self.layers[layer][linear.name][0], self.world_size, self.rank)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        self.partial = values
        return values if self.total is None else self.total


def scores_over_ranks(
    shape: ModelShape,
    layers: list[LayerTensors],
    *,
    scaling: float,
    world_size: int,
    criterion: Criterion = "lora",
    normalization: Normalization = "none",
) -> list[LayerScores]:
    """The scores that every one of `world_size` ranks arrives at."""

    def score(rank: int, total: Tensor | None) -> tuple[SplitModel, list[LayerScores]]:
        model: Any = SplitModel(shape, layers, scaling, world_size, rank, total)
        sums = score_groups(model, criterion, step=1)
        sums.check()
        return model, sums.by_layer(normalization)

    total = torch.zeros((), dtype=torch.float64)
    for rank in range(world_size):
        partial = score(rank, None)[0].partial
        assert partial is not None
        total = total + partial
    return score(0, total)[1]
