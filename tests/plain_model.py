"""The plain-tensor twin of the sharded model, on which the whole method runs unchanged, without DeepSpeed."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraprune_ds.model import adapters
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerKeep, Slice
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import CollectedLinear, ComputeWeight, LinearId, LoraFactors, OwnedShard


class PlainModel:
    """A `PrunableModel` over an ordinary PEFT model and a torch optimizer with per-parameter state."""

    world_size, rank, loss_scale = 1, 0, 1.0

    def __init__(self, model: PeftModel, shape: ModelShape, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.shape = shape
        self.optimizer = optimizer
        self.layers = decoder_layers(model)
        self.device = next(model.parameters()).device

    def lora_factors(self) -> Iterator[dict[str, LoraFactors]]:
        for i, layer in enumerate(self.layers):
            factors = {}
            for linear in self.shape.layers[i].linears:
                module = adapters.lora_linear(layer, linear.linear)
                a, b = adapters.lora_weights(module)
                assert a.grad is not None, "LoRA is scored after a backward"
                assert b.grad is not None, "LoRA is scored after a backward"
                whole = (t.detach().float() for t in (a, b, a.grad, b.grad))
                factors[linear.linear] = LoraFactors(*whole, scaling=module.scaling[adapters.ADAPTER])
            yield factors

    def owned_weight(self, linear_id: LinearId) -> OwnedShard:
        module = adapters.lora_linear(self.layers[linear_id.layer], linear_id.name)
        weight = cast(nn.Linear, module.base_layer).weight
        return OwnedShard(weight.detach().reshape(-1), 0, cast(tuple[int, int], tuple(weight.shape)))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def differing_rank(self, value: object) -> None:
        return None

    def owner(self, layer: int) -> int:
        return 0

    def reduce_to(self, owner: int, values: Tensor) -> Tensor:
        return values

    @torch.no_grad()
    def replace_weights(self, linear_ids: Sequence[LinearId], compute: ComputeWeight) -> None:
        for linear_id in linear_ids:
            module = adapters.lora_linear(self.layers[linear_id.layer], linear_id.name)
            base, (a, b) = cast(nn.Linear, module.base_layer), adapters.lora_weights(module)
            factors = (a.float(), b.float(), module.scaling[adapters.ADAPTER])
            whole = CollectedLinear({"weight": base.weight}, base.bias, *factors)
            base.weight.copy_(compute(linear_id, whole))

    @torch.no_grad()
    def cut(self, keep: list[LayerKeep]) -> int:
        after = self.shape.after(keep)
        for i, (layer, layer_keep) in enumerate(zip(self.layers, keep, strict=True)):
            for name, kept, linear in self.shape.layers[i].cuts(layer_keep):
                self._select(adapters.base_parameter(layer, name), kept)
                if linear:
                    module = adapters.lora_linear(layer, linear.linear)
                    for which, stays in linear.lora_cuts(module.r[adapters.ADAPTER], kept, layer_keep):
                        self._select(adapters.lora_weights(module)[which], stays)
                    adapters.set_features(module, *cast(nn.Linear, module.base_layer).weight.shape)
            adapters.set_attributes(layer, after.layers[i].attributes)
        self.shape = after
        return 0

    def _select(self, parameter: Tensor, kept: Slice) -> None:
        parameter.data = take(parameter.data, kept)
        parameter.grad = None
        state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key] = take(state[key], kept)


def take(tensor: Tensor, kept: Slice) -> Tensor:
    return tensor.index_select(kept.axis, kept.keep.to(tensor.device))
