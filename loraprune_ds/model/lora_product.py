"""A linear with LoRA as one operation of autograd.

PEFT's forward pass takes a dozen operations, most of the host's work in a step with narrow layers. Only the forward
pass is replaced. Modules, names and parameters remain PEFT's.
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
        a, b = (
            cast(nn.Linear, factors[adapter]).weight.to(x.dtype)
            for factors in (self.lora_A, self.lora_B)
        )
        dropout = self.lora_dropout[adapter]
        p = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        stored = stored_tensors(base)
        return _Product.apply(
            x, a, b, self.scaling[adapter], p, base.bias, storage_format(base), *stored
        )  # type: ignore[return-value]


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
        mask, kept = draw_mask(x, p) if p else (None, 1.0)
        s /= kept  # x would be wider
        narrow = _masked(x, mask) @ a.t()
        ctx.save_for_backward(x, mask, narrow, a, b, *stored)
        ctx.s, ctx.stored_as = s, stored_as
        out = x @ stored_as.join(stored).t()
        if bias is not None:
            out += bias
        return (narrow @ b.t()).mul_(s).add_(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mask, narrow, a, b, *stored = ctx.saved_tensors
        of_out = _rows(gradient)
        of_narrow = (of_out @ b).mul_(ctx.s)
        of_a = of_narrow.t() @ _rows(_masked(x, mask))
        of_b = (of_out.t() @ _rows(narrow)).mul_(ctx.s)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_out @ ctx.stored_as.join(stored)
            of_x = (
                of_x.addmm(of_narrow, a)
                if mask is None
                else of_x.addcmul_(of_narrow @ a, _rows(mask))
            )
            of_x = of_x.view(x.shape)
        return of_x, of_a, of_b, *[None] * (4 + len(stored))


def draw_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Returns a uint8 mask in the shape of x, and the exact probability of its ones."""
    # torch's dropout draws at least 32 bits per element, a tenth of a training step on a CPU. Here an element uses 16
    # bits, so p is rounded down to a multiple of 2⁻¹⁶.
    dropped = int(p * DRAW)
    # all 64 bits
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(
        -(1 << 63), None
    )
    numbers = draws.view(torch.int16)[: x.numel()].view(x.shape)
    # products with bytes are quicker on a CPU than those with bool
    mask = torch.empty_like(x, dtype=torch.uint8)
    return torch.ge(numbers, dropped - DRAW // 2, out=mask), 1 - dropped / DRAW


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
        blocks = zip(*(tensor.chunk(experts) for tensor in (weight, lora_a, lora_b)), strict=True)
        return torch.cat([merge_lora(w, a, b, scaling, dtype) for w, a, b in blocks])
    merged = torch.empty_like(weight, dtype=dtype)
    a, rows_at_once = lora_a.float(), max(1, MERGE_BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows_at_once):
        rows = slice(start, start + rows_at_once)
        merged[rows] = torch.addmm(weight[rows].float(), lora_b[rows].float(), a, alpha=scaling)
    return merged
