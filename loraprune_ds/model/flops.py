"""Counts the operations of LoRA training (two per multiply-add) and the bytes that a layer saves, from sizes alone."""

import json
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.adapters import add_lora, differentiate_input
from loraprune_ds.model.classes import build_on_meta, config_object, decoder_layers, shrink_on_meta, store_frozen
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.storage import FrozenStorage

WHOLE_QUERIES, WHOLE_KEYS = "self_attn.q_proj", "self_attn.k_proj"  # where heads stay
FUSED = "planned"  # our attention, by the name that transformers finds it under


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token meets: all, but only its chosen experts."""
    idle = sum(max(0, layer.get("experts", 0) - shape.experts_per_token) for layer in shape.layers)
    every = sum(math.prod(shape.linear_shape(i, linear)) for i, linear in shape.linear_ids())
    others = (size for i in range(len(shape.layers)) for size in shape.others(i).values())
    every += sum(math.prod(size) for size in others if len(size) > 1)  # whole linears without LoRA
    return every - idle * shape.group_numel("experts")


def mlp_width(shape: ModelShape, layer: int) -> int:
    """Counts the channels in the MLP of a layer that one token meets at the same time."""
    counts, matrices = shape.layers[layer], shape.whole.get(layer, {}).values()
    chosen = shape.experts_per_token * shape.expert_size if counts.get("experts") else 0
    whole = (rows if columns == shape.hidden_size else columns for rows, columns in matrices)
    return max(counts.get("channels", 0), chosen, *whole)


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers. Latent attention caches one key for all heads.

    With an encoder it is one of its tokens and one of its decoder's.
    """
    if latent := shape.widths.get("key_value_rank"):
        return len(shape.layers) * (latent + shape.head_dim)
    whole = sum(layer[WHOLE_KEYS][0] for layer in shape.whole.values() if WHOLE_KEYS in layer)
    heads = (layer.get(kind, 0) for layer in shape.layers[shape.encoder_layers :] for kind in ("heads", "cross_heads"))
    return 2 * (sum(heads) * shape.head_dim + whole)


def state_numel(shape: ModelShape) -> int:
    """Counts the elements of the states of all delta nets, which have no KV cache. They are fp32, for any window."""
    of_a_key_head = shape.widths.get("delta_key", 0) * shape.widths.get("delta_values", 0)
    return sum(layer.get("delta", 0) for layer in shape.layers) * of_a_key_head


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one product of attention in all layers, over all of the window.

    With latent attention scores and sums differ, and this is their mean. A delta net multiplies its state three times:
    by the key, by the query, and to add the value. That equals two products over half a window here.
    """
    width = sum(shape.widths.get(of, shape.head_dim) for of in ("query", "value")) / 2
    queries = (
        (shape.query_heads(layer) + layer.get("cross_heads", 0)) * width for layer in shape.layers if "heads" in layer
    )
    whole = (layer[WHOLE_QUERIES][0] for layer in shape.whole.values() if WHOLE_QUERIES in layer)
    return 2 * (sum(queries) + sum(whole)) * window + 6 * state_numel(shape)


def needed_flops_per_token(shape: ModelShape, window: float) -> float:
    """Returns the operations that training needs per token. The utilisation of a GPU (MFU) is counted in these.

    A frozen weight takes two passes: the output and the gradient of the input. Attention takes six products, over half
    a window on average (PaLM, arXiv 2204.02311, appendix B). Scoring and recomputation do not count. LoRA's own
    products are below 1 % and do not count either.

    Args:
        window: the tokens that attention covers. The mean over all tokens if texts differ.
    """
    frozen = active_numel(shape) + shape.vocab_size * shape.hidden_size  # the head is one more linear
    return (4 * frozen + 6 * attention_product(shape, window) / 2) / len(shape.layer_lists)  # a token is in one of them


def saved_by_layer(
    source: dict[str, Any],
    shape: ModelShape,
    index: int,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    *,
    storage: FrozenStorage,
    lora: LoraConfig,
    eager: bool,
) -> int:
    """Returns the bytes that one decoder layer saves without gradient checkpointing.

    Args:
        source: config.json of the dense model.
        tokens: samples, and the window of each.
        eager: with transformers' eager attention instead of a fused kernel.
    """
    family, depth, made = shape.family, len(shape.layers), _config_object(json.dumps(source))
    chosen, fields = family.around(made, index)
    lists = {key: x for key, x in source.items() if isinstance(x, list) and len(x) == depth and type(x[0]) is not float}
    few = source | {key: [value[i] for i in chosen] for key, value in lists.items()}
    of_few = shape.only(chosen)
    few |= {layers.count: len(x) for layers, x in zip(family.layer_lists, of_few.layer_lists, strict=True)} | fields
    few.pop(family.per_layer, None)
    if mixture := family.mixture:
        few |= mixture.dense([n for n, i in enumerate(chosen) if not shape.layers[i].get("experts")], len(chosen))
    if types := getattr(made, "layer_types", None):
        few["layer_types"] = [types[i] for i in chosen]
    at = chosen.index(index)
    return _saved(json.dumps(few), of_few, at, tokens, dtype, storage, lora, eager)


@cache
def _config_object(source: str) -> Any:
    return config_object(json.loads(source))


@cache
def _saved(
    source: str,
    shape: ModelShape,
    index: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    storage: FrozenStorage,
    lora: LoraConfig,
    eager: bool,
) -> int:
    """Counts the storages that a layer saves, its input included, the shared rotary angles excluded."""
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    causal_lm: Any = build_on_meta(json.loads(source), "eager" if eager else FUSED)
    shrink_on_meta(causal_lm, shape)
    store_frozen(causal_lm, shape, storage)
    with torch.device("meta"):
        model = add_lora(causal_lm, shape, lora, seed=0)
    model.to(device="meta", dtype=dtype).train()
    kept, others = list[Tensor](), list[Tensor](model.parameters())

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def enter(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        others.extend(x for x in pytree.tree_leaves((positional[1:], named)) if isinstance(x, Tensor))
        hooks.__enter__()

    layer = decoder_layers(model)[index]
    causal_lm.enable_input_require_grads()  # what comes from embeddings, as in every layer but the first
    differentiate_input(layer)  # encoder and decoder embed tokens in separate modules
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    tokens = torch.zeros(size, dtype=torch.int64, device="meta")
    # A mask of four dimensions is taken as it is. transformers would look into another, or into ids without one.
    mask = tokens.new_empty(size[0], 1, size[1], size[1], dtype=torch.bool)
    decoder = {"decoder_input_ids": tokens, "decoder_attention_mask": mask} if shape.encoder_layers else {}
    causal_lm.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **decoder)
    apart = {tensor.untyped_storage()._cdata for tensor in others}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(count for key, count in storages.items() if key not in apart)


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Saves what sdpa does."""
    sliding, window = settings.get("sliding_window"), queries.shape[-2]
    bias = None if settings.get("position_bias") is None else queries.new_empty(*queries.shape[:3], window)
    if sliding is not None and sliding <= window:  # a mask like the queries, and keys and values of every query head
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
