"""What torch does beside its operations, for the simulated device: storages, pinned memory, collectives of objects."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.support import device
from tests.support.device import NAME


def apply() -> None:
    """Patches torch in this process."""
    os.environ["USE_HUB_KERNELS"] = "NO"  # the hub knows no such device
    # a `with torch.device("meta")` knows functions by what they are
    torch.utils._device._device_constructors()
    torch.tensor = _made_on_host(torch.tensor)
    torch.load = _loaded_on_host(torch.load)
    torch.Tensor.new_tensor = _new_on_host(torch.Tensor.new_tensor)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = device.pin  # type: ignore[method-assign]
    torch.Tensor.is_pinned = device.is_pinned  # type: ignore[method-assign]
    torch.UntypedStorage.resize_ = _noting(torch.UntypedStorage.resize_)  # type: ignore[method-assign]
    torch.nn.Module._apply = _keeping_parameters(torch.nn.Module._apply)  # type: ignore[method-assign]
    of_device = torch.get_device_module(NAME)
    torch.accelerator.synchronize = of_device.synchronize
    torch.accelerator.current_stream = of_device.current_stream
    for name in device.OF_OBJECTS:
        setattr(dist, name, _one_wait(getattr(dist, name)))


def _made_on_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Makes a tensor of numbers on the host, then copies it, as CUDA does. torch's own way knows no Python backend."""

    @wraps(make)
    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(data, device=device, **options)
        return make(data, **options).to(device)

    return tensor


def _new_on_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def new_tensor(like: Tensor, data: Any, **options: Any) -> Tensor:
        if like.device.type != NAME:
            return make(like, data, **options)
        return torch.tensor(data, **{"dtype": like.dtype, "device": like.device} | options)

    return new_tensor


def _loaded_on_host(load: Callable[..., Any]) -> Callable[..., Any]:
    """Reads what was pickled on the host, then copies it to the device that is asked for."""

    @wraps(load)
    def loaded(file: Any, map_location: Any = None, **options: Any) -> Any:
        if map_location is None or torch.device(map_location).type != NAME:
            return load(file, map_location, **options)
        return tree_map_only(Tensor, lambda x: x.to(map_location), load(file, "cpu", **options))

    return loaded


def _keeping_parameters(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a module's parameters the same objects when they come to the device, as CUDA does."""

    @wraps(apply)
    def applied(module: Any, fn: Any, recurse: bool = True) -> Any:
        arrives = not all(isinstance(p, device.DeviceTensor) for p in module.parameters())
        torch.__future__.set_swap_module_params_on_conversion(arrives)
        return apply(module, fn, recurse)

    return applied


def _noting(resize: Callable[..., Any]) -> Callable[..., Any]:
    """Notes the bytes of a storage that FSDP2 frees or fills."""

    @wraps(resize)
    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        if storage._cdata in device.MEMORY.sizes:
            device.MEMORY.note(storage)
        return result

    return resized


def _one_wait(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Counts a collective of objects as one wait. What it is made of is torch's."""

    @wraps(collective)
    def counted(*args: Any, **kwargs: Any) -> Any:
        device.count_wait(collective.__name__)
        device.HUSHED.append(True)
        try:
            return collective(*args, **kwargs)
        finally:
            device.HUSHED.pop()

    return counted
