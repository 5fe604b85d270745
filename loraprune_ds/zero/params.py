"""Parameters that are born sharded, get a smaller or a new shard, or are gathered on the rank that owns their layer."""

import math
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    PartitionedParamStatus,
    ZeroParamStatus,
    free_param,
)
from deepspeed.utils import groups
from torch import Tensor, nn

from loraprune_ds.engine.cutting import replace_data
from loraprune_ds.files import JsonObject
from loraprune_ds.model.frozen import Blocks
from loraprune_ds.pretrained.build import replace_parameters
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.pruning.prunable_model import OwnedShard
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import overlap, owned_range, pad, partition_numel
from loraprune_ds.zero.device import accelerator, settle_shards
from loraprune_ds.zero.shards import full_shape


def shard_at_birth(
    model: nn.Module, weights: ModelWeights, ds_config: JsonObject, dtype: torch.dtype
) -> None:
    """Replaces every meta parameter by a ZeRO-3 parameter. Each rank reads only its own shards from disk. Collective.

    Buffers go to the device, because DeepSpeed leaves them on the host, and each forward pass would wait for a copy.
    """
    # With hpZ the first Init makes the group of a node, which lasts for the process. A second Init must reuse it.
    node_group = groups._get_zero_param_intra_parallel_group()
    init = Init(config_dict_or_path=ds_config, enabled=True, zero_param_parallel_group=node_group)
    with init:  # from now on autograd keeps no view of a gathered weight
        pass
    comm = Communicator()

    def read(name: str, like: Tensor) -> nn.Parameter:
        start, end = owned_range(like.numel(), comm.world_size, comm.rank)
        shard = weights.read_stored(name, start, end, dtype)
        padded = pad(shard, partition_numel(like.numel(), comm.world_size))
        return _zero_parameter(init, like.shape, padded)

    # One rank alone may find a weight that integers cannot hold.
    comm.all_or_raise(lambda: replace_parameters(model, read, init.local_device))
    # Orders the shards that were read before the first gather, also that of a teacher or an evaluation.
    settle_shards()


def _zero_parameter(init: Init, shape: torch.Size, shard: Tensor) -> nn.Parameter:
    # An expanded scalar has the shape of the full tensor and the memory of one element.
    scalar = shard.new_empty((), device=init.local_device)
    parameter = nn.Parameter(scalar.expand(shape), requires_grad=False)
    init._convert_to_deepspeed_param(parameter)
    free_param(parameter)
    # Under parameter offload this is the host, otherwise this rank's device.
    shard = shard.to(init.remote_device)
    if init.pin_memory:
        shard = accelerator().pin_memory(shard)
    _install(parameter, shard, tuple(shape))
    return parameter


def install_shard(parameter: nn.Parameter, shard: Tensor, shape: tuple[int, ...]) -> None:
    """Replaces this rank's shard by a new, padded one on the same device. The parameter now has `shape`.

    The parameter must not be gathered or in use by a module.
    """
    old: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    if old.is_pinned():
        shard = into_pinned(old, shard)
    _install(parameter, shard.detach().to(old.device), shape)


def into_pinned(old: Tensor, shard: Tensor) -> Tensor:
    """Puts a shard into the pinned block of the old one, or into a new block if a smaller one (a power of two) fits."""
    block = old.untyped_storage().nbytes()
    if (shard.nbytes - 1).bit_length() < (block - 1).bit_length():
        return accelerator().pin_memory(shard.detach().to(old.device))
    return old.detach()[: len(shard)].copy_(shard.detach())


def _install(parameter: nn.Parameter, shard: Tensor, shape: tuple[int, ...]) -> None:
    state: Any = parameter
    assert state.ds_status == ZeroParamStatus.NOT_AVAILABLE, (
        "a gathered parameter cannot change its shape"
    )
    assert not state.ds_active_sub_modules, "a parameter in use cannot change its shape"
    tensor: Any = shard
    tensor.ds_numel = shard.numel()
    tensor.status = PartitionedParamStatus.AVAILABLE
    tensor.final_location = None
    state.ds_tensor = tensor
    state.ds_shape = torch.Size(shape)
    state.ds_numel = math.prod(shape)
    state.ds_numel_aligned = shard.numel() * dist.get_world_size(state.ds_process_group)
    state.ds_secondary_tensor = None
    replace_data(parameter, torch.empty(0, dtype=parameter.dtype, device=parameter.device))


def free_shards(module: nn.Module) -> None:
    """Frees this rank's shards of all parameters of a module, even if they are still referenced."""
    for parameter in module.parameters():
        state: Any = parameter
        state.ds_tensor.data = state.ds_tensor.new_empty(0)
        state.ds_secondary_tensor = None


def owned_flat(parameter: Tensor, world_size: int, rank: int) -> tuple[Tensor, int]:
    """Returns this rank's elements without padding, and their start in the flat tensor. A view of the shard."""
    state: Any = parameter
    start, end = owned_range(state.ds_numel, world_size, rank)
    return state.ds_tensor.detach()[: end - start], start


def owned_blocks(base: Any, stored_as: Blocks, comm: Communicator) -> OwnedShard:
    """Returns this rank's shard of a weight in blocks, with the scales that it needs. Collective."""
    flat, start = owned_flat(base.weight, comm.world_size, comm.rank)
    rows, width = full_shape(base.weight)
    needed = needed_rows(rows, width, comm.world_size)
    scales = _fetch_rows(base.weight_scale, needed, comm)
    first = int(needed[comm.rank, 0])
    codec = stored_as.codec
    return OwnedShard(
        codec.elements(flat.to(comm.device)),
        start * codec.per_byte,
        (rows, width * codec.per_byte),
        partial(stored_as.decode, scales=scales, first_scales=first),
        transposed=stored_as.transposed,
    )


def needed_rows(rows: int, width: int, world_size: int) -> Tensor:
    """Returns the rows that each rank's shard has a part of, the first and the one after the last: (world_size, 2)."""
    start, end = _owned_ranges(rows * width, world_size).unbind(-1)
    first = start // width
    last = torch.where(end > start, -(-end // width), first)
    return torch.stack([first, last], 1)


def _owned_ranges(numel: int, world_size: int) -> Tensor:
    """Returns `owned_range` of each rank: (world_size, 2)."""
    return torch.tensor([owned_range(numel, world_size, rank) for rank in range(world_size)])


def _fetch_rows(parameter: Any, needed: Tensor, comm: Communicator) -> Tensor:
    """Fetches the rows of a sharded matrix that this rank needs. `needed` is of all ranks. Collective."""
    rows, columns = full_shape(parameter)
    rank = comm.rank
    needed = needed * columns
    owned = _owned_ranges(rows * columns, comm.world_size)
    # How many elements a rank (row) has and another (column) needs: (world_size, world_size).
    has_start, has_end = owned.unsqueeze(1).unbind(-1)
    needs_start, needs_end = needed.unbind(-1)
    sent = overlap(has_start, has_end, needs_start, needs_end)
    send = sent[rank].tolist()
    receive = sent[:, rank].tolist()

    flat, start = owned_flat(parameter, comm.world_size, rank)
    slices = (needed - start).clamp(min=0).tolist()
    outgoing = torch.cat([flat[low:high] for low, high in slices])
    return comm.all_to_all(outgoing.to(comm.device), send, receive).view(-1, columns)
