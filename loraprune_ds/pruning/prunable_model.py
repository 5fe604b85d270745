"""A model that can be pruned while it trains, the values that pass through it, and hooks on the inputs of its linears.

Each engine has one: zero/sharded.py for ZeRO-3, fsdp/model.py for FSDP2, local/model.py for one process and DDP.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.config_types import EngineName
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import ADAPTER, base_parameter, lora_linear, lora_weights
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import DENSE, StorageFormat, storage_format
from loraprune_ds.model.groups import LayerKeep, TensorSpec
from loraprune_ds.model.shape import LinearId, ModelShape
from loraprune_ds.ranks.device import foreach, storage_bytes
from loraprune_ds.ranks.flat import GATHERED_NUMEL, gather_rounds, layer_owner
from loraprune_ds.ranks.layout import Layout


@dataclass(frozen=True)
class LoraFactors:
    """Holds the LoRA of one linear and its loss gradients in fp32, averaged over the global batch, not clipped."""

    # The factors of the experts in a stack are concatenated along axis 0.
    A: Tensor  # (r, in_features)
    B: Tensor  # (out_features, r)
    grad_A: Tensor
    grad_B: Tensor
    scaling: float  # lora_alpha / r

    def transposed(self) -> "LoraFactors":
        """Returns the factors of the transposed weight, which is no stack."""
        return LoraFactors(self.B.t(), self.A.t(), self.grad_B.t(), self.grad_A.t(), self.scaling)


# (some rows of a weight as they are stored, number of the first) -> these rows in fp32, perhaps the same tensor
Decode = Callable[[Tensor, int], Tensor]


def in_fp32(rows: Tensor, first: int) -> Tensor:
    """Decodes rows of a weight that is stored in the model's dtype."""
    return rows.float()


@dataclass(frozen=True)
class OwnedShard:
    """Holds this rank's flat elements [start, start + len(flat)) of a row-major weight of `shape`.

    If `transposed`, the weight is the transpose of that of the linear.
    """

    flat: Tensor
    start: int
    shape: tuple[int, int]
    decode: Decode = in_fp32
    transposed: bool = False


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


class PrunableModel(ABC):
    """A PEFT model under pruning. Unless a method says otherwise, it is collective: every rank calls it, in one order.

    Attributes:
        skips_updates: a loss scaler leaves out updates whose gradients are not finite.
    """

    optimizer: torch.optim.Optimizer | None  # torch's, whose learning rate counts
    optimizer_state: Any  # OptimizerState (engine/optimizer_state.py)
    engine: EngineName  # which a saved state records
    skips_updates = False

    def __init__(self, module: nn.Module, shape: ModelShape, layout: Layout) -> None:
        self.module = module
        self.shape = shape
        self.layout = layout
        self.held = layout.held
        self.comm = layout.comm
        self.world_size = self.comm.world_size
        self.rank = self.comm.rank
        self.device = self.comm.device
        self.layers = decoder_layers(module)

    # Scoring

    @torch.no_grad()
    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        """Yields the LoRA of each layer's linears by name, between a step's last backward and its update.

        Gathers masters and gradients on every rank, several layers at once.
        """
        lora = [list(layer.values()) for layer in self.lora_parameters()]
        sizes: list[int] = []
        for layer in lora:
            numel = sum(math.prod(self.layout.full_shape(parameter)) for parameter in layer)
            sizes.append(2 * numel)  # with the gradients
        for layers in gather_rounds(sizes, GATHERED_NUMEL):
            parameters = [parameter for layer in layers for parameter in lora[layer]]
            parts = [self._master(parameter) for parameter in parameters]
            parts += self.unscaled([self.gradient(parameter) for parameter in parameters])
            full = self.layout.gather(parts, parameters * 2)
            weights = iter(full[: len(parameters)])
            grads = iter(full[len(parameters) :])
            for layer in layers:
                yield self._named_factors(layer, weights, grads)

    def _named_factors(
        self, layer: int, weights: Iterator[Tensor], grads: Iterator[Tensor]
    ) -> dict[str, LoraFactors]:
        """Names the factors of a layer. The iterators give A and B of each linear, in turn. Not collective."""
        factors = dict[str, LoraFactors]()
        for linear in self.shape.layers[layer].linears:
            scaling = self._module(LinearId(layer, linear.linear)).scaling[ADAPTER]
            factors[linear.linear] = LoraFactors(
                next(weights), next(weights), next(grads), next(grads), scaling
            )
        return factors

    @abstractmethod
    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        """Returns the shard of the frozen weight that this rank scores. Collective only for quantised weights."""

    @property
    @abstractmethod
    def loss_scale(self) -> float | Tensor:
        """The factor on gradients during a backward: 1 unless fp16. A tensor is on the device. Not collective."""

    @abstractmethod
    def scaler_state(self) -> JsonObject:
        """Describes fp16's loss scaler, if there is one. Not collective."""

    @abstractmethod
    def restore_scaler(self, saved: JsonObject) -> None:
        """Restores the loss scaler, as far as it knows the names in `saved`. Not collective."""

    # A cut

    def repeating_passes(self) -> AbstractContextManager[None]:
        """Lets forward passes run a layer at a time, outside of a training step."""
        return nullcontext()

    def gathered(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """Gathers the weights of modules once for all passes that go through them."""
        return nullcontext()

    def owner(self, layer: int) -> int:
        """Returns the rank that holds the full tensors of a layer. Not collective."""
        return layer_owner(layer, self.world_size)

    @torch.no_grad()
    def replace_weights(self, linear_ids: Sequence[LinearId], compute: ComputeWeight) -> None:
        """Gathers every linear on the owner of its layer, computes its new weight there, and sends it to all ranks.

        A round has one linear from each of `world_size` layers, so all owners compute in parallel. All ranks raise the
        UserError of `compute`.
        """
        grouped: dict[tuple[int, str], list[LinearId]] = {}
        for linear_id in linear_ids:
            key = linear_id.layer // self.world_size, linear_id.name
            grouped.setdefault(key, []).append(linear_id)
        for ids_of_round in grouped.values():
            collected = {linear_id: self.collect_linear(linear_id) for linear_id in ids_of_round}

            def compute_owned(
                collected: dict[LinearId, CollectedLinear | None] = collected,
            ) -> dict[LinearId, Tensor]:
                return {key: compute(key, x) for key, x in collected.items() if x is not None}

            results = self.comm.all_or_raise(compute_owned)
            collected.clear()
            for linear_id in ids_of_round:
                self._replace(linear_id, results.pop(linear_id, None))

    def _replace(self, linear_id: LinearId, weight: Tensor | None) -> None:
        """Overwrites a weight on all ranks by that of its owner, in its storage format."""
        base = self._module(linear_id).base_layer
        stored_as = storage_format(base)
        tensors: dict[str, Tensor] = {}
        if weight is not None:
            tensors |= stored_as.split(weight)
        del weight
        for name in stored_as.tensors:
            owner = self.owner(linear_id.layer)
            self.overwrite(getattr(base, name), owner, tensors.pop(name, None))

    @torch.no_grad()
    def overwrite(self, parameter: nn.Parameter, owner: int, tensor: Tensor | None) -> None:
        """Overwrites a parameter on all ranks by the `tensor` of rank `owner`, which is None elsewhere."""
        self.layout.overwrite(parameter, owner, tensor)

    @abstractmethod
    def cut(self, keep: list[LayerKeep]) -> int:
        """Removes all other groups from weights, biases, LoRA, masters and moments. Returns the bytes sent in all.

        The graph of an earlier loss may be alive, but its backward pass must be over.
        """

    # Checkpoints and exports

    def collect(
        self, parameter: nn.Parameter, owner: int, *, master: bool = False
    ) -> Tensor | None:
        """Returns a full parameter, or its fp32 master, on rank `owner`. None elsewhere."""
        part = self._master(parameter) if master else None
        return self.layout.collect(parameter, owner, part)

    def collect_named(
        self, named: dict[str, nn.Parameter], owner: int, *, master: bool = False
    ) -> dict[str, Tensor]:
        """Returns full parameters, or their fp32 masters, on rank `owner`. Empty elsewhere."""
        tensors = {name: self.collect(p, owner, master=master) for name, p in named.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def collect_stored(self, linear_id: LinearId) -> dict[str, Tensor]:
        """Returns a frozen weight in its storage format, on the owner of its layer. Empty elsewhere."""
        base = self._module(linear_id).base_layer
        stored = {name: getattr(base, name) for name in storage_format(base).tensors}
        return self.collect_named(stored, self.owner(linear_id.layer))

    def collect_linear(self, linear_id: LinearId) -> CollectedLinear | None:
        """Returns a full linear on the owner of its layer. None elsewhere."""
        owner = self.owner(linear_id.layer)
        module = self._module(linear_id)
        base = module.base_layer
        stored = self.collect_stored(linear_id)
        bias = None if base.bias is None else self.collect(base.bias, owner)
        a, b = (self.collect(factor, owner, master=True) for factor in lora_weights(module))
        if a is None or b is None:
            return None
        return CollectedLinear(stored, bias, a, b, module.scaling[ADAPTER], storage_format(base))

    def weight_bytes(self) -> list[int]:
        """Gathers the bytes of the weights that each rank holds: (world_size,)."""
        return self.comm.gather_objects(storage_bytes(map(self.held, self.module.parameters())))

    # Training

    def lora_parameters(self) -> list[dict[str, nn.Parameter]]:
        """Returns A and B of each linear of each layer, in this order, as "{linear}.lora_A". Not collective."""
        parameters = [dict[str, nn.Parameter]() for _ in self.layers]
        for layer, linear in self.shape.linears():
            a, b = lora_weights(lora_linear(self.layers[layer], linear.linear))
            parameters[layer] |= {f"{linear.linear}.lora_A": a, f"{linear.linear}.lora_B": b}
        return parameters

    def other_parameters(self, *, trained: bool) -> list[dict[str, nn.Parameter]]:
        """Returns the parameters that have no LoRA, by the names in exports. Not collective.

        Args:
            trained: take the learned copies of PEFT's `modules_to_save`, otherwise the initial ones.

        Returns:
            a dictionary for each layer, and one for the parameters outside of them.
        """
        base: Any = self.module
        parents = [*self.layers, base.get_base_model()]
        prefixes = [*map(self.shape.prefix, range(len(self.layers))), ""]
        tensors = [*(layer.others for layer in self.shape.layers), self.shape.outer]
        return [
            {
                prefix + spec.name: base_parameter(parent, spec.name, trained=trained)
                for spec in specs
            }
            for parent, prefix, specs in zip(parents, prefixes, tensors, strict=True)
        ]

    def trained_parameters(self) -> list[dict[str, nn.Parameter]]:
        """Returns the `other_parameters` that train. Not collective."""
        if all(".lora_" in n for n, p in self.module.named_parameters() if p.requires_grad):
            return [{} for _ in range(len(self.layers) + 1)]
        return [
            {name: parameter for name, parameter in named.items() if parameter.requires_grad}
            for named in self.other_parameters(trained=True)
        ]

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's part of an averaged LoRA gradient in fp32, scaled in fp16. Not collective."""

    def unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Returns gradients of the unscaled loss. The criterion is not linear in them (gB·gA). Not collective."""
        scale = self.loss_scale
        if isinstance(scale, Tensor) or scale != 1:
            gradients = list(foreach._foreach_div(gradients, scale))
        return gradients

    @abstractmethod
    def gradient_norm(self) -> Tensor:
        """Returns the norm of this rank's part of the averaged, unscaled gradients. Not collective."""

    def nonfinite_layer(self) -> int | None:
        """Returns the first layer with an inf or NaN in this rank's averaged LoRA gradients. Not collective."""
        return self.first_nonfinite(
            map(self.gradient, layer.values()) for layer in self.lora_parameters()
        )

    def nonfinite_weights(self) -> int | None:
        """Returns the first layer with an inf or NaN in this rank's weights, frozen or LoRA. Not collective."""
        return self.first_nonfinite(map(self.held, layer.parameters()) for layer in self.layers)

    @staticmethod
    def first_nonfinite(layers: Iterable[Iterable[Tensor]]) -> int | None:
        """Returns the index of the first layer with an inf or a NaN in its tensors. None if all are finite."""
        for i, layer in enumerate(layers):
            if not all(torch.isfinite(x).all() for x in layer):
                return i
        return None

    # Inside another trainer

    @abstractmethod
    def before_each_update(
        self, action: Callable[[], None], *, reads_gradients: bool = True
    ) -> Callable[[], None]:
        """Runs `action` right before each update, on averaged gradients without clipping. Returns an undo.

        Args:
            reads_gradients: `action` calls `gradient` or `lora_factors`.
        """

    def _master(self, parameter: nn.Parameter) -> Tensor:
        return self.optimizer_state.shard(parameter, "master").float()

    def _module(self, linear_id: LinearId) -> Any:
        return lora_linear(self.layers[linear_id.layer], linear_id.name)


def hook_inputs(
    model: PrunableModel,
    linears: Iterable[tuple[int, TensorSpec]],
    see: Callable[..., Tensor | None],
) -> Callable[[], None]:
    """Calls `see` in every forward pass with each linear and its input, and uses the input that it returns, if any.

    The input is (batch, window, in_features). That of a stack of experts is (tokens, in_features), in the order of the
    experts, and `see` also gets the tokens of each.

    Returns:
        An undo, which removes the hooks.
    """
    hooks = ExitStack()

    def hook(
        linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        changed = see(linear_id, *inputs)
        return None if changed is None else (changed, *inputs[1:])

    for i, linear in linears:
        module = lora_linear(model.layers[i], linear.linear)
        hook_of_linear = partial(hook, LinearId(i, linear.linear))
        hooks.enter_context(module.register_forward_pre_hook(hook_of_linear))
    return hooks.close
