"""The device that this rank computes on."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError

# Dense bf16 and fp16 matrix products, from NVIDIA's data sheets. The first entry that a card's name contains counts.
PEAK_TERAFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def accelerator() -> Any:
    return get_accelerator()


def is_cpu() -> bool:
    return accelerator().device_name() == "cpu"


def current_device() -> torch.device:
    return torch.device(accelerator().current_device_name())


def device_name() -> str:
    """Returns the GPU's product name, or the type of the device."""
    return torch.cuda.get_device_name() if accelerator().device_name() == "cuda" else accelerator().device_name()


def peak_flops(device: str, dtype: Dtype) -> float | None:
    """Returns the operations per second of a card's matrix units. None for an unknown card, a CPU, or float32.

    Args:
        device: as `device_name`.
    """
    known = next((teraflops for name, teraflops in PEAK_TERAFLOPS.items() if name in device), None)
    return None if known is None or dtype == "float32" else known * 1e12


def to_device(tensor: Tensor) -> Tensor:
    """Copies a tensor of the host to this rank's device, asynchronously."""
    return accelerator().pin_memory(tensor).to(current_device(), non_blocking=True)


def settle_shards() -> None:
    """Waits for the device, at the end of every cut, refit, restore and update.

    With `overlap_comm` DeepSpeed gathers on a separate stream, which never waits for the one that computes: a prefetch
    could read a shard before it is written.
    """
    accelerator().synchronize()


def empty_cache() -> None:
    """Returns unused device memory, which torch would keep, to NCCL and CUDA."""
    accelerator().empty_cache()


def empty_host_cache() -> None:
    """Frees pinned memory that no tensor uses. torch would keep every block for later tensors of that size."""
    if accelerator().device_name() != "cuda":
        return
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    else:
        torch._C._host_emptyCache()  # torch 2.7


def check_dtype(dtype: str) -> None:
    """Checks that this rank's device can train in `dtype`. Raises a UserError that names the device."""
    supported = {"float16": accelerator().is_fp16_supported, "bfloat16": _computes_bf16}
    if dtype in supported and not supported[dtype]():
        raise UserError(f"model.dtype {dtype} is not supported by the {accelerator().device_name()} device")


def _computes_bf16() -> bool:
    """Whether the device has instructions for bf16. A GPU older than Ampere emulates them, slower than fp32."""
    if accelerator().device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator().is_bf16_supported()
