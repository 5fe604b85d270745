"""Replaces frozen weights. The owner of a layer computes the new ones whole."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.frozen import form_of
from loraprune_ds.pruning.prunable_model import CollectedLinear, ComputeWeight, LinearId
from loraprune_ds.zero.collect import collect_linear
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.flat import layer_owner
from loraprune_ds.zero.params import overwrite_shard


@torch.no_grad()
def replace_weights(
    layers: nn.ModuleList, linear_ids: Sequence[LinearId], compute: ComputeWeight, comm: Communicator
) -> None:
    """Gathers every linear on the owner of its layer, computes there, scatters the result. Collective.

    A round has one linear of each of `world_size` layers. So all owners compute at once. A rank holds one whole
    linear at most.

    Raises:
        UserError: as `compute` raises it on some rank. It is raised on all of them.
    """
    for ids_of_round in rounds(linear_ids, comm.world_size):
        whole: dict[LinearId, CollectedLinear] = {}
        for linear_id in ids_of_round:
            module = lora_linear(layers[linear_id.layer], linear_id.linear)
            collected = collect_linear(module, layer_owner(linear_id.layer, comm.world_size), comm)
            if collected is not None:
                whole[linear_id] = collected
            del collected  # only `whole` holds it, until the round's results are there
        results = comm.all_or_raise(
            lambda whole=whole: {linear_id: compute(linear_id, linear) for linear_id, linear in whole.items()}
        )
        whole.clear()
        for linear_id in ids_of_round:
            base = cast(nn.Linear, lora_linear(layers[linear_id.layer], linear_id.linear).base_layer)
            owner = layer_owner(linear_id.layer, comm.world_size)
            tensors = _held_tensors(base, results.pop(linear_id, None))
            for name in list(tensors):
                _install(getattr(base, name), owner, tensors.pop(name), comm)
    settle_shards()


def rounds(linear_ids: Sequence[LinearId], world_size: int) -> list[list[LinearId]]:
    """Groups linears so that no two of a round have the same owner (flat.owner_rounds)."""
    grouped: dict[tuple[int, str], list[LinearId]] = {}
    for linear_id in linear_ids:
        grouped.setdefault((linear_id.layer // world_size, linear_id.linear.name), []).append(linear_id)
    return list(grouped.values())


def _held_tensors(base: nn.Linear, whole: Tensor | None) -> dict[str, Tensor | None]:
    """Returns what holds a new weight, by name. On the owner with values."""
    form = form_of(base)
    return dict.fromkeys(form.tensors) if whole is None else {**form.split(whole, whole.dtype)}


def _install(parameter: Any, owner: int, whole: Tensor | None, comm: Communicator) -> None:
    flat = None if whole is None else whole.reshape(-1)
    shard = torch.empty_like(parameter.ds_tensor, device=comm.device)
    comm.scatter_from(owner, flat, shard)
    overwrite_shard(parameter, shard)
