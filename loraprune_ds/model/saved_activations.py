"""Counts what autograd saves in a decoder layer, by running the layer on the meta device without memory or weights."""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.classes import build_on_meta, decoder_layers, hold_frozen
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.shapes import ModelShape

FUSED = "planned"  # our attention, by the name that transformers finds it under


def saved_by_layer(
    source: dict[str, Any],
    shape: ModelShape,
    index: int,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    *,
    lora_rank: int,
    dropout: bool,
    eager: bool = False,
) -> int:
    """Returns the bytes that one decoder layer saves without gradient checkpointing.

    Args:
        source: config.json of the dense model.
        tokens: samples, and the window of each.
        eager: with transformers' eager attention instead of a fused kernel.
    """
    depth = int(source["num_hidden_layers"])
    lists = {key: value for key, value in source.items() if isinstance(value, list) and len(value) == depth}
    alone = source | {key: [value[index]] for key, value in lists.items()} | {"num_hidden_layers": 1}
    one = shape.with_layers((shape.layers[index],))
    return _saved(json.dumps(alone), one, tokens, dtype, lora_rank, dropout, eager)


@cache
def _saved(
    source: str, shape: ModelShape, size: tuple[int, int], dtype: torch.dtype, rank: int, dropout: bool, eager: bool
) -> int:
    """Counts the storages that the only layer saves, its input included, the shared rotary angles excluded."""
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    config = export_config(json.loads(source), shape, "bfloat16").config
    causal_lm: Any = build_on_meta(config, "eager" if eager else FUSED)
    hold_frozen(causal_lm, shape)
    with torch.device("meta"):
        model = add_lora(causal_lm, shape, LoraConfig(r=rank, lora_dropout=0.5 if dropout else 0.0), seed=0)
    model.to(device="meta", dtype=dtype).train()
    causal_lm.enable_input_require_grads()  # as every layer's but the first
    kept, others = list[Tensor](), list[Tensor](model.parameters())

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def enter(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        others.extend(x for x in pytree.tree_leaves((positional[1:], named)) if isinstance(x, Tensor))
        hooks.__enter__()

    layer = decoder_layers(model)[0]
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    tokens = torch.zeros(size, dtype=torch.int64, device="meta")
    # With a mask, else transformers looks at the ids for padding.
    causal_lm.model(input_ids=tokens, attention_mask=tokens.bool(), use_cache=False)
    apart = {tensor.untyped_storage()._cdata for tensor in others}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(count for key, count in storages.items() if key not in apart)


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Saves what sdpa does. For a sliding window narrower than the text, that includes a mask in the dtype of the
    queries, and separate keys and values for every query head.
    """
    sliding, window = settings.get("sliding_window"), queries.shape[-2]
    bias = None
    if sliding is not None and sliding <= window:
        keys, values = (x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        bias = queries.new_empty(len(queries), 1, window, window)
    out: Any = _FusedAttention.apply(queries, keys, values, bias)
    return out.transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, the output and the fp32 log-sum-exp. All are (batch, heads, window, ...)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(queries[..., : values.shape[-1]])  # in memory as the queries, as on GPUs
        ctx.save_for_backward(queries, keys, values, mask, out, torch.empty_like(queries[..., 0], dtype=torch.float32))
        return out
