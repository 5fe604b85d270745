"""What pruning needs of a model, whoever holds it: the ZeRO-3 ranks (`sharded.py`) or one process (`plain.py`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loraprune_ds.model.shapes import Kind, LayerShape, Linear, ModelShape, group_indices


@dataclass(frozen=True)
class LoraFactors:
    """The LoRA of one linear with the loss gradients averaged over the global batch: unclipped, unscaled, fp32.

    Shapes: A and grad_A (r, in_features); B and grad_B (out_features, r). `scaling` is lora_alpha / r.
    """

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor
    scaling: float


@dataclass(frozen=True)
class OwnedShard:
    """The flat piece [start, start + len(flat)) of a row-major weight of `shape` that this rank owns."""

    flat: Tensor
    start: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class LayerKeep:
    """Groups that stay in one decoder layer: ascending int64 indices into its current groups."""

    heads: Tensor
    channels: Tensor

    def of(self, kind: Kind) -> Tensor:
        """(kept groups of this kind,)"""
        return self.heads if kind == "heads" else self.channels

    @property
    def shape(self) -> LayerShape:
        """Of the layer after the cut."""
        return LayerShape(len(self.heads), len(self.channels))

    def select(self, keep: "LayerKeep") -> "LayerKeep":
        """Selects some of the groups that stay; `keep` has indices into them."""
        return LayerKeep(self.heads[keep.heads], self.channels[keep.channels])

    def cuts(self, layer: LayerShape, kind: Kind) -> bool:
        """Whether a layer of this shape loses groups of this kind."""
        return len(self.of(kind)) < layer.count(kind)

    def indices(self, shape: ModelShape, linear: Linear) -> Tensor:
        """Along `linear.axis`, the rows or columns that stay: each group is `group_width` wide."""
        return group_indices(self.of(linear.kind), shape.group_width(linear))


@dataclass(frozen=True)
class CollectedLinear:
    """A whole linear: frozen weight and bias, and the fp32 masters of its LoRA."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class LinearId(NamedTuple):
    """One linear of one decoder layer."""

    layer: int
    linear: Linear


# A whole linear -> its new weight or bias, same shape and dtype. Raises UserError where that cannot be computed.
ComputeTensor = Callable[[LinearId, CollectedLinear], Tensor]


class PrunableModel(Protocol):
    """The model under pruning. Methods are collective, unless they say so: every rank calls them in the same order."""

    shape: ModelShape
    world_size: int
    rank: int
    device: torch.device
    layers: nn.ModuleList

    def lora_factors(self, layer: int) -> dict[str, LoraFactors]:
        """The seven linears' LoRA of a layer by name; valid between the last backward of a step and its update."""
        ...

    def owned_weight(self, layer: int, linear: Linear) -> OwnedShard:
        """The piece of the frozen weight that this rank owns. No communication."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a small tensor over all ranks; `values` is used up."""
        ...

    def gather_values(self, value: int) -> list[int]:
        """One 63-bit integer of every rank, in rank order."""
        ...

    def broadcast(self, values: Tensor) -> Tensor:
        """Rank 0's tensor on every rank."""
        ...

    def owner(self, layer: int) -> int:
        """The rank that holds what is kept whole of a layer. No communication."""
        ...

    def reduce_to(self, owner: int, values: Tensor) -> Tensor | None:
        """Sum over all ranks on rank `owner`; None elsewhere. `values` is used up."""
        ...

    def reduce_scatter(self, values: Tensor) -> Tensor:
        """Sum over all ranks of flat tensors as long as a weight: this rank gets the piece it owns of that weight."""
        ...

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by during a backward: 1 unless fp16. No communication."""
        ...

    def replace_tensors(
        self, linear_ids: Sequence[LinearId], what: Literal["weight", "bias"], compute: ComputeTensor
    ) -> None:
        """Replaces whole weights or biases, each computed on its layer's owner, owners at the same time."""
        ...

    def cut(self, keep: list[LayerKeep]) -> int:
        """Physically removes all other groups: weights, biases, LoRA, fp32 masters and Adam moments.

        Returns:
            Bytes that this rank sent to others.
        """
        ...
