"""Parameters that are born sharded, and how a live one gets a smaller shard."""

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus, free_param
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus as ShardStatus
from deepspeed.utils import groups
from torch import Tensor, nn

from loraprune_ds.zero.device import accelerator
from loraprune_ds.zero.flat import owned_range, partition_numel

ReadFlat = Callable[[str, int, int, torch.dtype], Tensor]


def shard_at_birth(
    model: nn.Module, read_flat: ReadFlat, *, ds_config: dict[str, Any], dtype: torch.dtype, world_size: int, rank: int
) -> None:
    """Replaces every meta parameter by a ZeRO-3 parameter. Each rank reads the shards that it owns from disk.

    No tensor is ever whole on a rank and nothing is broadcast. Tied parameters stay one parameter. Buffers go to the
    device. DeepSpeed leaves them on the host, and each forward pass would wait for a copy.

    Args:
        model: modules with parameters on the meta device.
        read_flat: (name, start, end, dtype) -> the flat elements [start, end) of a tensor on disk. A weight that is
            int8 on meta comes as int8, all else in `dtype`.
    """
    # With hpZ the first Init makes the group of a node. It is the process's, so a second Init must not make it again.
    node_group = groups._get_zero_param_intra_parallel_group()
    init = Init(config_dict_or_path=ds_config, enabled=True, zero_param_parallel_group=node_group)
    with init:  # has autograd keep no view of a gathered weight until its backward. That stays so after it
        pass
    sharded: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in sharded:
                start, end = owned_range(parameter.numel(), world_size, rank)
                full_name = f"{module_name}.{name}" if module_name else name
                shard = pad(read_flat(full_name, start, end, dtype), parameter.numel(), world_size)
                sharded[id(parameter)] = _zero_parameter(init, parameter.shape, shard)
            module._parameters[name] = sharded[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(init.local_device)


def _zero_parameter(init: Init, shape: torch.Size, shard: Tensor) -> nn.Parameter:
    # An expanded scalar has the whole tensor's shape and the memory of one element.
    parameter = nn.Parameter(shard.new_empty(1, device=init.local_device).expand(shape), requires_grad=False)
    init._convert_to_deepspeed_param(parameter)
    free_param(parameter)
    # It goes where DeepSpeed would put it. That is the host under parameter offload, else this rank's device.
    shard = shard.to(init.remote_device)
    _install(parameter, accelerator().pin_memory(shard) if init.pin_memory else shard, tuple(shape))
    return parameter


def pad(shard: Tensor, numel: int, world_size: int) -> Tensor:
    """Pads a shard with zeros to the length that all ranks share."""
    size = partition_numel(numel, world_size)
    return shard if len(shard) == size else torch.cat([shard, shard.new_zeros(size - len(shard))])


def install_shard(parameter: nn.Parameter, shard: Tensor, shape: tuple[int, ...]) -> None:
    """Replaces this rank's shard by a new, padded one. The parameter now has `shape`.

    The new shard goes where the old one was. No module may be using the parameter, and it must not be gathered.
    """
    old: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    if old.is_pinned():
        shard = into_pinned(old, shard)
    _install(parameter, shard.detach().to(old.device), shape)


def into_pinned(old: Tensor, shard: Tensor) -> Tensor:
    """Puts a shard into the pinned block of the one before it. If a smaller block is enough, it gets one.

    Pinning takes long. torch rounds blocks up to a power of two. So most cuts would get a block of the same size.
    """
    block = old.untyped_storage().nbytes()
    if (shard.nbytes - 1).bit_length() < (block - 1).bit_length():
        return accelerator().pin_memory(shard.detach().to(old.device))
    return old.detach()[: len(shard)].copy_(shard.detach())


def _install(parameter: nn.Parameter, shard: Tensor, shape: tuple[int, ...]) -> None:
    state: Any = parameter
    assert state.ds_status == ZeroParamStatus.NOT_AVAILABLE, "a gathered parameter cannot change its shape"
    assert not state.ds_active_sub_modules, "a parameter in use cannot change its shape"
    tensor: Any = shard
    tensor.ds_numel = shard.numel()
    tensor.status = ShardStatus.AVAILABLE
    tensor.final_location = None
    state.ds_tensor = tensor
    state.ds_shape = torch.Size(shape)
    state.ds_numel = math.prod(shape)
    state.ds_numel_aligned = shard.numel() * dist.get_world_size(state.ds_process_group)
    state.ds_secondary_tensor = None
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def overwrite_shard(parameter: nn.Parameter, shard: Tensor) -> None:
    """Copies new values into this rank's (padded) shard, on the device or the host. The shape stays."""
    state: Any = parameter
    state.ds_tensor.copy_(shard)
    state.ds_secondary_tensor = None  # hpZ's copy is of the old values. The next gather makes it anew


def owned_flat(parameter: Tensor, world_size: int, rank: int) -> tuple[Tensor, int]:
    """Returns this rank's elements without padding, and their start in the flat tensor. A view of the shard."""
    state: Any = parameter
    start, end = owned_range(state.ds_numel, world_size, rank)
    return state.ds_tensor.detach()[: end - start], start


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
