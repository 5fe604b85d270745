"""Gathers full linears and tensors on the rank that owns their layer, and replaces frozen weights there."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from deepspeed.utils import safe_get_local_fp32_param
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.adapters import ADAPTER, lora_linear, lora_weights
from loraprune_ds.model.frozen import storage_format
from loraprune_ds.pruning.prunable_model import CollectedLinear, ComputeWeight, LinearId
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.flat import layer_owner
from loraprune_ds.zero.params import full_shape, overwrite_shard


@torch.no_grad()
def collect_tensor(parameter: Tensor, owner: int, comm: Communicator, shard: Tensor | None = None) -> Tensor | None:
    """Gathers a parameter, or its fp32 state by each rank's `shard`, on rank `owner`. None elsewhere. Collective."""
    local = parameter.ds_tensor if shard is None else shard  # type: ignore[attr-defined]
    gathered = comm.gather_to(owner, local.detach().to(comm.device))  # an offloaded shard is on the host
    if gathered is None:
        return None
    shape = full_shape(parameter)
    return gathered.reshape(-1)[: torch.Size(shape).numel()].view(shape)


def collect_named(named: dict[str, nn.Parameter], owner: int, comm: Communicator) -> dict[str, Tensor]:
    """Gathers parameters on rank `owner`. Empty elsewhere. Collective."""
    tensors = {name: collect_tensor(parameter, owner, comm) for name, parameter in named.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def collect_stored(module: LoraLinear, owner: int, comm: Communicator) -> dict[str, Tensor]:
    """Gathers the frozen weight of a linear on rank `owner`, in its storage format. Empty elsewhere. Collective."""
    base = cast(nn.Linear, module.base_layer)
    return collect_named({name: getattr(base, name) for name in storage_format(base).tensors}, owner, comm)


def collect_linear(module: LoraLinear, owner: int, comm: Communicator) -> CollectedLinear | None:
    """Gathers one linear of a decoder layer on rank `owner`. Returns None elsewhere. Collective."""
    base, (a, b) = cast(nn.Linear, module.base_layer), lora_weights(module)
    stored = collect_stored(module, owner, comm)
    bias = None if base.bias is None else collect_tensor(base.bias, owner, comm)
    masters = [collect_tensor(p, owner, comm, safe_get_local_fp32_param(p)) for p in (a, b)]
    if comm.rank != owner:
        return None
    master_a, master_b = cast(list[Tensor], masters)
    return CollectedLinear(stored, bias, master_a, master_b, module.scaling[ADAPTER], storage_format(base))


@torch.no_grad()
def replace_weights(
    layers: nn.ModuleList, linear_ids: Sequence[LinearId], compute: ComputeWeight, comm: Communicator
) -> None:
    """Gathers every linear on the owner of its layer, computes its new weight there, and scatters it. Collective.

    A round has one linear from each of `world_size` layers, so all owners compute in parallel. All ranks raise the
    UserError of `compute`.
    """
    grouped: dict[tuple[int, str], list[LinearId]] = {}
    for linear_id in linear_ids:
        grouped.setdefault((linear_id.layer // comm.world_size, linear_id.name), []).append(linear_id)
    for ids_of_round in grouped.values():
        collected: dict[LinearId, CollectedLinear] = {}
        for linear_id in ids_of_round:
            module = lora_linear(layers[linear_id.layer], linear_id.name)
            linear = collect_linear(module, layer_owner(linear_id.layer, comm.world_size), comm)
            if linear is not None:
                collected[linear_id] = linear
            del linear  # only `collected` keeps it, until the results of the round exist
        results = comm.all_or_raise(
            lambda collected=collected: {linear_id: compute(linear_id, each) for linear_id, each in collected.items()}
        )
        collected.clear()
        for linear_id in ids_of_round:
            base = cast(nn.Linear, lora_linear(layers[linear_id.layer], linear_id.name).base_layer)
            _install(base, layer_owner(linear_id.layer, comm.world_size), results.pop(linear_id, None), comm)
    settle_shards()  # orders the refitted weights before the next gather, also without the cut that follows


def _install(base: nn.Linear, owner: int, weight: Tensor | None, comm: Communicator) -> None:
    """Scatters the new weight of a linear from `owner`, in its storage format."""
    stored_as = storage_format(base)
    tensors: dict[str, Tensor] = {} if weight is None else {**stored_as.split(weight, weight.dtype)}
    del weight
    for name in stored_as.tensors:
        parameter: Any = getattr(base, name)
        tensor = tensors.pop(name, None)
        shard = torch.empty_like(parameter.ds_tensor, device=comm.device)
        comm.scatter_from(owner, None if tensor is None else tensor.reshape(-1), shard)
        overwrite_shard(parameter, shard)
