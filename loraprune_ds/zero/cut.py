"""Cuts the parameters of a decoder layer in place: frozen weights, biases and LoRA. Shards travel by all-to-all."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import (
    base_parameter,
    lora_linear,
    lora_weights,
    set_features,
    set_runtime_counts,
)
from loraprune_ds.model.shapes import LayerKeep, ModelShape
from loraprune_ds.model.storage import FrozenStorage, lora_cuts
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import AxisCut, ReshardPlan
from loraprune_ds.zero.params import full_shape, install_shard

ParameterCut = tuple[nn.Parameter, ReshardPlan]


class Item(NamedTuple):
    """A flat shard (padding allowed) and the plan of its tensor."""

    shard: Tensor
    plan: ReshardPlan


def parameter_cuts(
    layer: nn.Module, shape: ModelShape, index: int, keep: LayerKeep, comm: Communicator
) -> list[ParameterCut]:
    """Lists the parameters of layer `index` that get smaller. `shape` is from before the cut."""
    plans: dict[tuple[tuple[int, ...], int, int], ReshardPlan] = {}
    cuts: list[ParameterCut] = []
    for name, kept, linear in FrozenStorage.of(layer).layer_cuts(shape, index, keep):
        found = [(base_parameter(layer, name), kept)]
        if linear:
            module = lora_linear(layer, linear)
            for adapter in module.lora_A:  # the reference model of DPO or GRPO may be a second adapter
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
    """Gives the modules of a layer their sizes after the cut. `shape` is from before it."""
    after = shape.with_layers((*shape.layers[:index], keep.shape, *shape.layers[index + 1 :]))
    for linear in shape.linears(index):
        set_features(lora_linear(layer, linear), *after.linear_shape(index, linear))
    set_runtime_counts(layer, shape, keep.shape)


def cut_parameters(cuts: list[ParameterCut], comm: Communicator) -> None:
    """Makes the parameters smaller in place. Collective: one all-to-all per dtype."""
    items = [Item(cast(Any, p).ds_tensor.detach().to(comm.device), plan) for p, plan in cuts]
    for (parameter, plan), shard in zip(cuts, reshard(items, comm), strict=True):
        install_shard(parameter, shard, plan.cut.new_shape)


@torch.no_grad()
def reshard(items: list[Item], comm: Communicator) -> list[Tensor]:
    """Exchanges shards for new, padded ones, in the order of `items`. Collective: one all-to-all per dtype.

    Peak memory is at most four times the old shards: old, outgoing, incoming and new ones.
    """
    new: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(item.shard.dtype for item in items):  # LoRA may be fp32 on a bf16 base
        same = [i for i, item in enumerate(items) if item.shard.dtype == dtype]
        outgoing, plans = _by_destination([items[i] for i in same]), [items[i].plan for i in same]
        send, receive = [0] * comm.world_size, [0] * comm.world_size
        for plan in plans:
            for counts, total in ((plan.send, send), (plan.receive, receive)):
                for rank, count in counts.items():
                    total[rank] += count
        incoming = comm.all_to_all(outgoing, send, receive)
        del outgoing
        new |= zip(same, _by_item(incoming, plans), strict=True)
        del incoming
    return [new[i] for i in range(len(items))]


def _by_destination(items: list[Item]) -> Tensor:
    """Orders the kept elements by destination rank, then by item, in one buffer."""
    parts: list[tuple[int, Tensor]] = []
    for shard, plan in items:
        parts += zip(plan.send, plan.take(shard).split(list(plan.send.values())), strict=True)
    parts.sort(key=lambda part: part[0])  # stable: the items of a rank stay in order
    return torch.cat([items[0].shard[:0], *(part for _, part in parts)])


def _by_item(incoming: Tensor, plans: list[ReshardPlan]) -> list[Tensor]:
    """Makes the padded new shards from a buffer ordered by source rank, then by item."""
    order = sorted((source, i) for i, plan in enumerate(plans) for source in plan.receive)
    arrived = incoming.split([plans[i].receive[source] for source, i in order])
    parts: list[list[Tensor]] = [[] for _ in plans]
    for (_, i), part in zip(order, arrived, strict=True):
        parts[i].append(part)
    return [
        torch.cat([*own, incoming.new_zeros(plan.new_partition - sum(plan.receive.values()))])
        for plan, own in zip(plans, parts, strict=True)
    ]
