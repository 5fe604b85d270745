"""Starts processes whose accelerator is the simulated one: for DeepSpeed too, and for the package by torch alone."""

import os
from pathlib import Path

import torch

from tests.support import device
from tests.support.ranks import start_deepspeed


def start_on_device(rank: int, world_size: int, folder: Path) -> None:
    """Makes this process a rank with the device. Collectives are gloo's, on the wrapped tensors."""
    use_device()
    start_deepspeed(rank, world_size, folder)
    os.environ.pop("DS_ACCELERATOR")  # which the package obeys


def use_device() -> None:
    """Makes the simulated device this process's accelerator."""
    os.environ.pop("DS_ACCELERATOR", None)
    device.register()
    # imported after torch knows the device
    from deepspeed.accelerator import set_accelerator
    from deepspeed.runtime.zero import partition_parameters

    from tests.support.device_deepspeed import Accelerator

    set_accelerator(Accelerator())
    # `zero.Init` puts back what DeepSpeed's import saw, before our patches where a server has preloaded it
    partition_parameters._orig_torch_tensor = torch.tensor
