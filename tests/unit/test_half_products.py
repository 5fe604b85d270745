"""Half-precision products through fp32 equal torch's own to a rounding. They cost one part of a weight at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.zero import device
from loraprune_ds.zero.device import ThroughFloat32, fast_half_products


def attend(x: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = functional.linear(x, w).unflatten(-1, (3, -1)).transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask, is_causal=mask is None)


def masked_attention(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    n = x.shape[1]
    return attend(x, w, torch.zeros(n, n, dtype=x.dtype).masked_fill(torch.eye(n) == 1, -2.0))


Product = Callable[[Tensor, Tensor, Tensor], Tensor]
PRODUCTS: dict[str, Product] = {
    "linear": lambda x, w, bias: functional.linear(x, w),
    "linear with bias": functional.linear,
    "scaled": lambda x, w, bias: torch.addmm(bias, x.flatten(0, 1), w.t(), beta=0.5, alpha=2),
    "batched": lambda x, w, bias: torch.bmm(x, w.t().expand(len(x), -1, -1)),
    "batched with addition": lambda x, w, bias: torch.baddbmm(bias, x, w.t().expand(len(x), -1, -1)),
    "attention": lambda x, w, bias: attend(x, w),
    "masked attention": masked_attention,
}


def outputs(product: Product, dtype: torch.dtype) -> list[Tensor]:
    """Returns the product and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 16, 24), (48, 24), (48,))
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    out = product(*tensors)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


class Halves(TorchDispatchMode):
    """Notes the products of half-precision tensors that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("mm", "attention")) and args[0].dtype in device.HALF:
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", device.HALF)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_same_as_torchs_own_product(product: Product, dtype: torch.dtype) -> None:
    with Halves() as without:
        expected = outputs(product, dtype)
    with Halves() as through, ThroughFloat32():
        got = outputs(product, dtype)
    assert without.seen
    assert not through.seen
    for mine, torchs in zip(got, expected, strict=True):
        assert mine.dtype == torchs.dtype
        # A sum of about 24 terms in another order rounds to the next number at most. Attention rounds a few times.
        assert (mine - torchs).abs().max() <= 4 * torch.finfo(dtype).eps * torchs.abs().max()


def test_other_dtypes_are_left_alone() -> None:
    expected = outputs(PRODUCTS["linear"], torch.float64)
    with ThroughFloat32():
        assert all(map(torch.equal, outputs(PRODUCTS["linear"], torch.float64), expected))


@pytest.mark.parametrize("columns", [1, 5, 48, 1000])
@pytest.mark.parametrize("name", ["linear", "linear with bias"])
def test_a_weight_in_parts_is_the_same_product(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    product = PRODUCTS[name]
    with ThroughFloat32():
        whole = outputs(product, torch.bfloat16)
        monkeypatch.setattr(device, "LARGEST_COPY", 24 * columns)
        parts = outputs(product, torch.bfloat16)
    for mine, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2**-8, atol=2**-8)  # one rounding of bf16


@pytest.mark.parametrize(
    ("dtype", "has_instructions", "goes"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float16", False, True), ("float32", False, False)],
)
def test_only_where_that_is_faster(
    dtype: str, has_instructions: bool, goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: has_instructions)
    assert isinstance(fast_half_products(dtype), ThroughFloat32) == goes
