"""The device of this rank as DeepSpeed sees it."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator


def accelerator() -> Any:
    return get_accelerator()


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
