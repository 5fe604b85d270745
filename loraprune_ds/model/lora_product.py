"""A linear with LoRA as one operation of autograd.

PEFT's forward pass takes a dozen operations. With narrow layers they are most of the host's work in a step. Only the
forward pass is replaced. Modules, names and parameters remain PEFT's.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.frozen import StorageFormat, storage_format, stored_tensors

DRAW = 1 << 16  # dropout draws one of DRAW numbers per element
MERGE_BLOCK = 1 << 24  # elements in fp32 at a time


class FusedLoraLinear(LoraLinear):
    """PEFT's linear with one adapter. Without dropout the outputs are bitwise equal. Dropout masks differ."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = cast(nn.Linear, self.base_layer)
        if self.disable_adapters:
            return base(x)
        (adapter,) = self.active_adapters
        a = cast(nn.Linear, self.lora_A[adapter]).weight.to(x.dtype)
        b = cast(nn.Linear, self.lora_B[adapter]).weight.to(x.dtype)
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        scaling = self.scaling[adapter]
        stored_as = storage_format(base)
        stored = stored_tensors(base)
        return _Product.apply(x, a, b, scaling, p, base.bias, stored_as, *stored)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """Maps x to x·Wᵀ + bias + s · drop(x)·Aᵀ·Bᵀ, with gradients for x, A and B.

    autograd saves x, the mask, drop(x)·Aᵀ, and the parameters themselves, which ZeRO-3 frees and gathers again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        s: float,
        p: float,
        bias: Tensor | None,
        stored_as: StorageFormat,
        *stored: Tensor,
    ) -> Tensor:
        mask = None
        if p:
            mask, kept = draw_mask(x, p)
            s /= kept  # x would be wider
        narrow = _masked(x, mask) @ a.t()
        ctx.save_for_backward(x, mask, narrow, a, b, *stored)
        ctx.s = s
        ctx.stored_as = stored_as
        out = x @ stored_as.join(stored).t()
        if bias is not None:
            out += bias
        return (narrow @ b.t()).mul_(s).add_(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mask, narrow, a, b, *stored = ctx.saved_tensors
        out_gradient = _rows(gradient)
        narrow_gradient = (out_gradient @ b).mul_(ctx.s)
        a_gradient = narrow_gradient.t() @ _rows(_masked(x, mask))
        b_gradient = (out_gradient.t() @ _rows(narrow)).mul_(ctx.s)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = out_gradient @ ctx.stored_as.join(stored)
            if mask is None:
                x_gradient = x_gradient.addmm(narrow_gradient, a)
            else:
                x_gradient = x_gradient.addcmul_(narrow_gradient @ a, _rows(mask))
            x_gradient = x_gradient.view(x.shape)
        without_gradient = [None] * (4 + len(stored))
        return x_gradient, a_gradient, b_gradient, *without_gradient


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Returns a uint8 mask in the shape of x, and the exact probability of its ones."""
    # torch's dropout draws at least 32 bits per element, a tenth of a training step on a CPU. Here an element uses 16
    # bits, so p is rounded down to a multiple of 2⁻¹⁶.
    dropped = int(p * DRAW)
    words = -(-x.numel() // 4)  # each has four draws
    draws = torch.empty(words, dtype=torch.int64, device=x.device)
    draws.random_(-(1 << 63), None)  # all 64 bits
    numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
    # Products with bytes are quicker on a CPU than products with bool.
    mask = torch.empty_like(x, dtype=torch.uint8)
    lowest_kept = dropped - DRAW // 2
    torch.ge(numbers, lowest_kept, out=mask)
    return mask, 1 - dropped / DRAW


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def merge_lora(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """Computes W + scaling·B·A in fp32, a block of rows at a time, and rounds once, to `dtype`.

    Args:
        weight: (out_features, in_features). The experts of a stack are concatenated along axis 0, as in A and B.
        lora_a: (r, in_features), preferably the fp32 master.
        lora_b: (out_features, r).
        scaling: lora_alpha / r.
    """
    experts = len(lora_a) // lora_b.shape[1]
    if experts > 1:
        weights = weight.chunk(experts)
        blocks = zip(weights, lora_a.chunk(experts), lora_b.chunk(experts), strict=True)
        return torch.cat([merge_lora(w, a, b, scaling, dtype) for w, a, b in blocks])
    merged = torch.empty_like(weight, dtype=dtype)
    a = lora_a.float()
    block = max(1, MERGE_BLOCK // weight.shape[1])  # rows
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        merged[rows] = torch.addmm(weight[rows].float(), lora_b[rows].float(), a, alpha=scaling)
    return merged
