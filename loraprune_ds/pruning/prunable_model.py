"""The protocol of a model that can be pruned, the values that pass through it, and hooks on the inputs of its linears.

zero/sharded.py implements it on the ranks of ZeRO-3, tests/plain_model.py in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.frozen import DENSE, StorageFormat
from loraprune_ds.model.groups import LayerKeep, TensorSpec
from loraprune_ds.model.shape import LinearId, ModelShape


@dataclass(frozen=True)
class LoraFactors:
    """Holds the LoRA of one linear and its loss gradients in fp32, averaged over the global batch, not clipped."""

    # The factors of the experts in a stack are concatenated along axis 0.
    A: Tensor  # (r, in_features)
    B: Tensor  # (out_features, r)
    grad_A: Tensor
    grad_B: Tensor
    scaling: float  # lora_alpha / r


# (some rows of a weight as they are stored, number of the first) -> a new tensor with these rows in fp32
Decode = Callable[[Tensor, int], Tensor]


def in_fp32(rows: Tensor, first: int) -> Tensor:
    """Decodes rows of a weight that is stored in the model's dtype."""
    return rows.to(torch.float32, copy=True)


@dataclass(frozen=True)
class OwnedShard:
    """Holds this rank's flat elements [start, start + len(flat)) of a row-major weight of `shape`."""

    flat: Tensor
    start: int
    shape: tuple[int, int]
    decode: Decode = in_fp32


def split_experts(shard: OwnedShard, factors: LoraFactors) -> Iterator[tuple[OwnedShard, LoraFactors]]:
    """Yields this rank's part of each expert's linear. A linear that is not a stack counts as one expert."""
    experts = len(factors.A) // factors.B.shape[1]
    rows, columns = shard.shape[0] // experts, shard.shape[1]
    split = (tensor.chunk(experts) for tensor in (factors.A, factors.B, factors.grad_A, factors.grad_B))
    for i, of_expert in enumerate(zip(*split, strict=True)):
        origin = shard.start - i * rows * columns  # start of the shard, counted from the first element of the expert
        low = min(max(origin, 0), rows * columns)
        high = max(low, min(origin + len(shard.flat), rows * columns))
        own = slice(low - origin, high - origin)

        def decode(stored: Tensor, first: int, above: int = i * rows) -> Tensor:
            return shard.decode(stored, above + first)

        owned = OwnedShard(shard.flat[own], low, (rows, columns), decode)
        yield owned, LoraFactors(*of_expert, scaling=factors.scaling)


@dataclass(frozen=True)
class CollectedLinear:
    """Holds a full linear: the tensors that store its frozen weight, its bias, and its LoRA in fp32."""

    stored: dict[str, Tensor]
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    stored_as: StorageFormat = DENSE

    @cached_property
    def weight(self) -> Tensor:
        """The weight that the linear computes with."""
        return self.stored_as.join(self.stored.values())


# Computes the new weight of a full linear, in its shape and dtype. Raises UserError if it cannot.
ComputeWeight = Callable[[LinearId, CollectedLinear], Tensor]


class PrunableModel(Protocol):
    """The model under pruning. Unless a method says otherwise, it is collective: every rank calls it, in one order."""

    shape: ModelShape
    world_size: int
    rank: int
    device: torch.device
    layers: nn.ModuleList

    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        """Yields the LoRA of each layer's linears by name, between a step's last backward and its update."""
        ...

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        """Returns the shard of the frozen weight that this rank owns. Collective only for int8 weights."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sums a small tensor over all ranks, in place."""
        ...

    def differing_rank(self, value: object) -> int | None:
        """Returns the first rank whose value differs from rank 0's. None if all ranks have the same."""
        ...

    def owner(self, layer: int) -> int:
        """Returns the rank that holds the full tensors of a layer. Not collective."""
        ...

    def reduce_to(self, owner: int, values: Tensor) -> Tensor | None:
        """Sums over all ranks on rank `owner`; None elsewhere. Overwrites `values`."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor on gradients during a backward: 1 unless fp16. Not collective."""
        ...

    def replace_weights(self, linear_ids: Sequence[LinearId], compute: ComputeWeight) -> None:
        """Replaces frozen weights. Each is computed on the owner of its layer. Owners work in parallel."""
        ...

    def cut(self, keep: list[LayerKeep]) -> int:
        """Removes all other groups from weights, biases, LoRA, masters and moments. Returns the bytes sent in all."""
        ...


# (linear, its input; for a stack also the tokens of each expert) -> a replacement for the input, or None to keep it.
SeeInput = Callable[..., Tensor | None]


def hook_inputs(model: PrunableModel, linears: Iterable[tuple[int, TensorSpec]], see: SeeInput) -> None:
    """Calls `see` in every forward pass with the input of each linear: (batch, window, in_features).

    The input of a stack of experts is (tokens, in_features), in the order of the experts.
    """

    def hook(linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = see(linear_id, *inputs)
        return None if changed is None else (changed, *inputs[1:])

    for i, linear in linears:
        module = lora_linear(model.layers[i], linear.linear)
        module.register_forward_pre_hook(partial(hook, LinearId(i, linear.linear)))
