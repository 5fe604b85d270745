"""The simulated device as DeepSpeed asks for it."""

from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from tests.support import device


class Accelerator(CPU_Accelerator):
    """DeepSpeed's view of the device: as its CPU one, with another name."""

    def __init__(self) -> None:
        super().__init__()
        self._name = device.NAME

    def device_name(self, device_index: int | None = None) -> str:
        return device.NAME if device_index is None else f"{device.NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device(device.DEVICE)

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return device.DEVICE

    def device_count(self) -> int:
        return 8

    def synchronize(self, device_index: int | None = None) -> None:
        device.count_wait("synchronize")

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return device.pin(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return device.is_pinned(tensor)

    def communication_backend_name(self) -> str:
        return "gloo"

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == device.NAME

    def memory_allocated(self, device_index: int | None = None) -> int:
        return device.MEMORY.alive
