"""The device of this rank: its name, its memory, and half-precision products on a CPU."""

import ctypes
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# On a CPU oneDNN compiles a kernel for each shape of a bf16 product, in 3 ms and half a megabyte. Every cut brings new
# shapes. 512 are those of a step of 40 layers with different widths. With less room than a step needs, each step would
# compile again. torch's own cache saves no time beside oneDNN's. (tests/benchmarks/kernel_caches.py)
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512", "LRU_CACHE_CAPACITY": "32"}
HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten
foreach: Any = torch  # Names of operations that are one kernel for many tensors look private.


def is_cpu() -> bool:
    """Returns whether this rank computes on the CPU. Like DeepSpeed, it obeys DS_ACCELERATOR=cpu."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.accelerator.is_available()


def current_device() -> torch.device:
    return torch.device("cpu" if is_cpu() else torch.get_device_module().current_device())


def device_name() -> str:
    """Returns the GPU's product name, or the type of the device."""
    kind = current_device().type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to a device, without waiting for it. Returns one that is there already."""
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def empty_cache() -> None:
    """Returns unused device memory from torch to NCCL and CUDA."""
    if not is_cpu():
        torch.get_device_module().empty_cache()


def limit_kernels() -> None:
    """Limits the compiled kernels that a CPU rank keeps, unless the user has. Must run before its first product."""
    if is_cpu():
        for name, capacity in KERNEL_CACHES.items():
            os.environ.setdefault(name, capacity)


def trim_heap() -> None:
    """Returns the unused heap of a CPU rank to the system. glibc would keep what lies between used blocks."""
    if is_cpu():
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # other C libraries lack it
            libc.malloc_trim(0)


def resident_bytes() -> int:
    """Returns the allocated device memory, or the anonymous and shared pages of a CPU process."""
    if is_cpu():
        return _process_bytes("RssAnon", "RssShmem")
    return int(torch.get_device_module().memory_allocated())


def reserved_bytes() -> int:
    """Returns the device memory of torch's allocator, used or not. 0 on a CPU, where it keeps none."""
    return 0 if is_cpu() else int(torch.get_device_module().memory_reserved())


def peak_bytes() -> int:
    """Returns this rank's peak since `reset_peak`: of the device allocator, or the resident peak of a CPU process."""
    if is_cpu():
        return _process_bytes("VmHWM")
    return int(torch.get_device_module().max_memory_allocated())


def reset_peak() -> bool:
    """Begins a new peak. Returns False if the system cannot, as in some sandboxes."""
    if not is_cpu():
        torch.get_device_module().reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # only resets VmHWM
    except OSError:
        return False
    return True


class StepPeak:
    """Measures the peak memory of each step.

    Only for our own processes, because it resets the peak of the process at each step.
    """

    def __init__(self) -> None:
        self._earlier = 0
        self._measures = False

    def begin(self) -> None:
        self._earlier = self.of_process()
        self._measures = reset_peak()

    def of_step(self) -> int:
        """Returns the peak since `begin`, without mapped files. 0 if it was not measured."""
        if not self._measures:
            return 0
        mapped_bytes = _process_bytes("RssFile") if is_cpu() else 0
        return peak_bytes() - mapped_bytes

    def of_process(self) -> int:
        return max(self._earlier, peak_bytes())


def _process_bytes(*keys: str) -> int:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[key].split()[0]) * 1024 for key in keys)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages of some tensors. Views and aliases count once."""
    sizes: dict[int, int] = {}  # address -> bytes
    for tensor in tensors:
        if tensor.numel():
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def fast_half_products(dtype: str) -> AbstractContextManager[Any]:
    """Computes this thread's products in `dtype` through fp32 while open, but only if that is faster."""
    if not is_cpu():
        return nullcontext()
    is_native = True
    if dtype == "bfloat16":
        is_native = has_fast_bfloat16()
    elif dtype == "float16":
        is_native = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return nullcontext() if is_native else ThroughFloat32()


def has_fast_bfloat16() -> bool:
    """Returns True if this CPU computes products in bf16 faster than in fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class ThroughFloat32(TorchDispatchMode):
    """Computes products of half-precision CPU tensors in fp32. All other operations pass unchanged.

    On a CPU without half-precision instructions torch's own loop is ten to thirty times slower. Either way the sums are
    fp32 and rounded once, so results differ only if the order of a sum decides a rounding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype not in HALF or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        first: Tensor = args[0]
        wide_args = map(_widen, args)
        wide_kwargs = {name: _widen(value) for name, value in kwargs.items()}
        output = func(*wide_args, **wide_kwargs)
        if isinstance(output, Tensor):
            return output.to(first.dtype)
        # Attention's log-sum-exp has fewer dimensions and stays fp32.
        return tuple(_narrow(part, first.dtype, first.dim()) for part in output)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _narrow(value: Tensor, dtype: torch.dtype, dim: int) -> Tensor:
    return value.to(dtype) if value.dim() == dim else value


PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
