"""Matrix products of bf16 and fp16 on a CPU without instructions for them, for example one with AVX2 only.

torch's own loop is ten to thirty times slower than fp32 (tests/benchmarks/README.md). Either way the sums are fp32 and
rounded once, at the end. Results differ only where the order of a sum decides a rounding.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.zero.device import is_cpu

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
LARGEST_COPY = 2**24  # elements of a weight in fp32 at once: 64 MiB


def fast_half_products(dtype: str) -> AbstractContextManager[Any]:
    """Computes this thread's products in `dtype` through fp32 while open, but only if that is faster."""
    if not is_cpu():
        return nullcontext()
    native = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return nullcontext() if dtype not in native or native[dtype]() else ThroughFloat32()


class ThroughFloat32(TorchDispatchMode):
    """Computes products of half-precision CPU tensors in fp32. All other operations pass unchanged."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = PRODUCTS.get(func)
        if product is None or args[0].dtype not in HALF or args[0].device.type != "cpu":
            return func(*args, **(kwargs or {}))
        return product(*args, **(kwargs or {}))


def _mm(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies (n, k) by (k, m), usually a weight, with a part of its columns in fp32 at a time."""
    wide = left.float()
    return torch.cat([(wide @ part.float()).to(left.dtype) for part in _columns(right, len(right))], dim=1)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    wide, biases = left.float(), _columns(bias.expand(len(left), right.shape[1]), len(right))
    parts = zip(biases, _columns(right, len(right)), strict=True)
    sums = (torch.addmm(b.float(), wide, part.float(), beta=beta, alpha=alpha) for b, part in parts)
    return torch.cat([columns.to(left.dtype) for columns in sums], dim=1)  # one part in fp32 at a time


def _columns(matrix: Tensor, height: int) -> tuple[Tensor, ...]:
    """Splits into groups of columns with at most `LARGEST_COPY` elements, each `height` high."""
    return matrix.split(max(1, LARGEST_COPY // height), dim=1)


def _widened(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `operation` on fp32 copies of half-precision activations. Attention's log-sum-exp stays fp32."""

    def product(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = operation(first.float(), *map(_widen, args), **{name: _widen(value) for name, value in kwargs.items()})
        if isinstance(wide, Tensor):
            return wide.to(first.dtype)
        return tuple(result.to(first.dtype) if result.dim() == first.dim() else result for result in wide)

    return product


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


PRODUCTS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _widened(aten.bmm),
    aten.baddbmm.default: _widened(aten.baddbmm),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _widened(
        aten._scaled_dot_product_flash_attention_for_cpu
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _widened(
        aten._scaled_dot_product_flash_attention_for_cpu_backward
    ),
}
