"""A LoRA model on the meta device, with the modules and shapes of a run and no memory. A pass through it is quick.

The planner reads off it in which order the modules run (passes.py) and what autograd keeps (activations.py). So it
knows no family's layer by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.classes import build_on_meta, hold_frozen
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
        source: config.json of the dense model, with the layers of `shape` alone (`with_layers`).
        eager: attention is transformers' own. Else it keeps what a fused kernel keeps.
    """
    config = export_config(source, shape, "bfloat16").config
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    model = with_token_losses(build_on_meta(config, "eager" if eager else FUSED), None)
    hold_frozen(model, shape)
    model.lm_head = _Head()
    with torch.device("meta"):
        wrapped = add_lora(model, shape, LoraConfig(r=lora_rank, lora_dropout=0.5 if dropout else 0.0), seed=0)
    return wrapped.to(device="meta", dtype=dtype).train()


def ids(samples: int, window: int) -> Tensor:
    """Returns the (samples, window) tokens of a micro-batch."""
    return torch.zeros(samples, window, dtype=torch.int64, device="meta")


def with_layers(source: dict[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Returns config.json of a model that has some layers of `source` alone, with what lists say of them."""
    depth = int(source["num_hidden_layers"])
    lists = {key: value for key, value in source.items() if isinstance(value, list) and len(value) == depth}
    own = {key: [value[i] for i in layers] for key, value in lists.items()}
    return source | own | {"num_hidden_layers": len(layers)}


class _Head(nn.Module):
    """Stands in for the head, whose loss picks tokens by their labels. Nothing is known of these on meta."""

    def forward(self, hidden: Tensor, labels: Tensor, distillation: None, supervised: None) -> Tensor:
        return hidden.view_as(hidden)


class _FusedAttention(torch.autograd.Function):
    """Keeps what it is given, the output and the fp32 log-sum-exp. All are (batch, heads, window, ...)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(queries[..., : values.shape[-1]])  # in memory as the queries, as on GPUs
        ctx.save_for_backward(queries, keys, values, mask, out, torch.empty_like(queries[..., 0], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(given) for given in ctx.saved_tensors[:3]), None


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Keeps what sdpa does. Where a sliding window is narrower than the text, that takes a mask in the dtype of the
    queries, of every layer anew. With a mask, every query head has keys and values of its own.
    """
    sliding, window = settings.get("sliding_window"), queries.shape[-2]
    bias = None
    if sliding is not None and sliding <= window:
        keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        bias = queries.new_empty(len(queries), 1, window, window)
    out: Any = _FusedAttention.apply(queries, keys, values, bias)
    return out.transpose(1, 2).contiguous(), None
