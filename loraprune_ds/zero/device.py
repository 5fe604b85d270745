"""The device of this rank as DeepSpeed sees it."""

from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from loraprune_ds.errors import UserError


def accelerator() -> Any:
    return get_accelerator()


def check_dtype(dtype: str) -> None:
    """Checks that this rank's device can train in `dtype`. Raises a UserError that names the device."""
    supported = {"float16": accelerator().is_fp16_supported, "bfloat16": accelerator().is_bf16_supported}
    if accelerator().device_name() == "cuda":  # a GPU older than Ampere emulates bf16, slower than fp32
        supported["bfloat16"] = partial(torch.cuda.is_bf16_supported, including_emulation=False)
    if dtype in supported and not supported[dtype]():
        raise UserError(f"model.dtype {dtype} is not supported by the {accelerator().device_name()} device")


def settle_shards() -> None:
    """Waits for the device, at the end of each birth, restore, update, refit and cut of shards."""
    # With `overlap_comm` DeepSpeed gathers on a separate stream, which never waits for the computing one. A
    # prefetch could read a shard before it is written.
    accelerator().synchronize()


def empty_host_cache() -> None:
    """Frees pinned memory that no tensor uses. torch would keep every block for later tensors of that size."""
    if accelerator().device_name() != "cuda":
        return
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    else:
        torch._C._host_emptyCache()  # torch 2.7
