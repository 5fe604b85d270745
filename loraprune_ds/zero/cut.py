"""Cuts the parameters of one decoder layer: frozen weights, biases and the LoRA of all adapters, each in place."""

from typing import Any, cast

import torch
from torch import nn

from loraprune_ds.model.adapters import (
    base_parameter,
    lora_linear,
    lora_weights,
    set_features,
    set_runtime_counts,
)
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.cuts import layer_cuts, lora_cuts
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import AxisCut, ReshardPlan, owned_range
from loraprune_ds.zero.params import ReadFlat, full_shape, install_shard, overwrite_shard, pad
from loraprune_ds.zero.reshard import Item, reshard_each_dtype

ParameterCut = tuple[nn.Parameter, ReshardPlan]


def parameter_cuts(
    layer: nn.Module, shape: ModelShape, index: int, keep: LayerKeep, comm: Communicator
) -> list[ParameterCut]:
    """Lists the parameters of a layer that get smaller, in the same order on every rank. Those cut alike share a plan.

    Args:
        layer: the decoder layer of this index.
        shape: of the model before the cut.
    """
    plans: dict[tuple[tuple[int, ...], int, int], ReshardPlan] = {}
    cuts: list[ParameterCut] = []
    for name, kept, linear in layer_cuts(shape, index, keep):
        found = [(base_parameter(layer, name), kept)]
        if linear:
            module = lora_linear(layer, linear)
            for adapter in module.lora_A:  # a reference of DPO or GRPO may stand beside the trained one
                factors = lora_weights(module, adapter)
                cut = lora_cuts(linear, module.r[adapter], kept, keep)
                found += [(factors[which], stays) for which, stays in cut]
        for parameter, stays in found:
            key = (full_shape(parameter), stays.axis, id(stays.keep))
            if key not in plans:
                plans[key] = ReshardPlan(AxisCut(full_shape(parameter), *stays), comm.world_size, comm.rank)
            cuts.append((parameter, plans[key]))
    return cuts


def set_sizes(layer: nn.Module, shape: ModelShape, index: int, keep: LayerKeep) -> None:
    """Tells the modules of a layer the sizes that they have after the cut. `shape` is from before it."""
    after = shape.with_layers((*shape.layers[:index], keep.shape, *shape.layers[index + 1 :]))
    for linear in shape.linears(index):
        set_features(lora_linear(layer, linear), *after.linear_shape(index, linear))
    set_runtime_counts(layer, shape, keep.shape)


def cut_parameters(cuts: list[ParameterCut], comm: Communicator) -> None:
    """Makes the parameters smaller in place. Collective: one all-to-all per dtype."""
    items = [Item(cast(Any, p).ds_tensor.detach().to(comm.device), plan) for p, plan in cuts]
    shards = reshard_each_dtype(items, comm)  # fp32 LoRA may stand beside a bf16 base
    for (parameter, plan), shard in zip(cuts, shards, strict=True):
        install_shard(parameter, shard, plan.cut.new_shape)


@torch.no_grad()
def cut_without_engine(module: nn.Module, shape: ModelShape, keep: list[LayerKeep]) -> None:
    """Cuts a PEFT model that no engine has taken yet. Collective.

    Its parameters may be sharded from birth or whole. A model from `from_pretrained` has both: LoRA is still whole.
    """
    comm = Communicator()
    for index, (layer, layer_keep) in enumerate(zip(decoder_layers(module), keep, strict=True)):
        cuts = parameter_cuts(layer, shape, index, layer_keep, comm)
        cut_parameters([(p, plan) for p, plan in cuts if hasattr(p, "ds_tensor")], comm)
        for parameter, plan in cuts:
            if not hasattr(parameter, "ds_tensor"):
                parameter.data = parameter.data.index_select(plan.cut.axis, plan.cut.keep.to(parameter.device))
        if cuts:
            set_sizes(layer, shape, index, layer_keep)


@torch.no_grad()
def overwrite_linears(module: nn.Module, shape: ModelShape, read_flat: ReadFlat) -> None:
    """Reads the frozen weights of all decoder layers' linears again, into a PEFT model that no engine has taken yet.

    Args:
        shape: of the model now.
        read_flat: as `PretrainedModel.read_flat`.
    """
    comm = Communicator()
    for index, layer in enumerate(decoder_layers(module)):
        for linear in shape.linears(index):
            name = f"{linear.name}.weight"
            parameter: Any = base_parameter(layer, name)
            full_name = f"model.layers.{index}.{name}"
            if hasattr(parameter, "ds_tensor"):
                start, end = owned_range(parameter.ds_numel, comm.world_size, comm.rank)
                flat = read_flat(full_name, start, end, parameter.dtype)
                overwrite_shard(parameter, pad(flat, parameter.ds_numel, comm.world_size))
            else:
                flat = read_flat(full_name, 0, parameter.numel(), parameter.dtype)
                parameter.copy_(flat.view_as(parameter))
