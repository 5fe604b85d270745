"""A LoRA model on the meta device, with the modules and shapes of a run and no memory. A pass through it is quick.

The planner reads off it in which order the modules run (passes.py) and what autograd keeps (activations.py). So it
knows no family's layer by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.adapters import ADAPTER, add_lora
from loraprune_ds.model.classes import build_on_meta
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.token_loss import with_token_losses

FUSED = "planned"  # our attention, by the name that transformers finds it under


def build_modules(
    source: dict[str, Any],
    shape: ModelShape,
    *,
    lora_rank: int = 8,
    dropout: bool = False,
    eager: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftModel:
    """Builds the model of a training run at `shape`, in training mode.

    Args:
        source: config.json of the dense model. It may have more layers than `shape`.
        eager: attention is transformers' own. Else it keeps what a fused kernel keeps.
    """
    depth = int(source["num_hidden_layers"])
    per_layer = {key: value[: len(shape.layers)] for key, value in source.items() if _is_list(value, depth)}
    config = export_config(source | per_layer, shape, "bfloat16").config
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    model = with_token_losses(build_on_meta(config, "eager" if eager else FUSED), None)
    model.lm_head = _Head()
    with torch.device("meta"):
        wrapped = add_lora(model, shape, LoraConfig(r=lora_rank, lora_dropout=0.5 if dropout else 0.0), seed=0)
    return wrapped.to(device="meta", dtype=dtype).train()


def ids(samples: int, window: int) -> Tensor:
    """Returns the (samples, window) tokens of a micro-batch."""
    return torch.zeros(samples, window, dtype=torch.int64, device="meta")


def fuse_dropout(model: nn.Module) -> None:
    """Lets dropout keep a mask of one byte per element, as on GPUs. On CPU ranks it has the model's dtype."""
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_dropout[ADAPTER] = _FusedDropout()


@contextmanager
def as_under_zero3() -> Iterator[None]:
    """Replaces torch's linear by one that keeps its input for the backward pass, as DeepSpeed's does."""
    stock = nn.functional.linear
    nn.functional.linear = _Linear.apply  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.linear = stock


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


class _Head(nn.Module):
    """Stands in for the head, whose loss picks tokens by their labels. Nothing is known of these on meta."""

    def forward(self, hidden: Tensor, labels: Tensor, distillation: None, supervised: None) -> Tensor:
        return hidden.view_as(hidden)


class _FusedDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.5, train=True)[0]


class _Linear(torch.autograd.Function):
    """Maps like `nn.functional.linear`. A frozen weight does not spare it the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, output and the fp32 log-sum-exp. All are (batch, heads, window, ...)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = torch.empty_like(queries)  # in memory as the queries, as on GPUs
        ctx.save_for_backward(queries, keys, values, out, torch.empty_like(queries[..., 0], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    return _FusedAttention.apply(queries, keys, values).transpose(1, 2).contiguous(), None  # type: ignore[attr-defined]
