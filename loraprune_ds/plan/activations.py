"""Bytes of a micro-batch's activations: what a layer saves for its backward pass, and the widest places of a pass."""

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.model.adapters import add_lora, base_parameter, differentiate_input
from loraprune_ds.model.classes import build_on_meta, decoder_layers, shrink_on_meta, store_as_int8
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.logits import chunk_size
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.request import PlannedBatch, Request
from loraprune_ds.pretrained.fewer_layers import config_of_layers

FUSED = "planned"  # the name of our attention in transformers


def activations(request: Request, shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the peak of a micro-batch, without logits."""
    t, e, h, indices = batch.tokens, batch.element_size, shape.hidden_size, range(len(shape.layers))
    layers = [saved_in_layer(request, shape, i, batch) for i in indices]
    checkpointed = len(layers) * e * t * h + max(layers)
    kept = checkpointed if request.config.train.gradient_checkpointing else sum(layers)
    # Gradients of the residual, and at the widest place: in the MLP, in eager attention (fp32), or in a norm (fp32).
    scores = [8 * batch.probabilities(layer) for layer in shape.attention]
    widest = max(max(4 * e * t * mlp_width(shape, i), scores[i]) for i in indices)
    gradients = 2 * e * t * h + max(widest, 12 * t * h)
    rotary_angles, last_norm = 2 * e * batch.window * shape.head_dim, 4 * t * h + 4 * t + e * t * h
    return kept + gradients + rotary_angles + batch.causal_mask + last_norm


def forward_temporaries(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes at the widest place of a pass without backward, in the MLP or in eager attention."""
    e = batch.element_size
    mlp = max(4 * e * batch.tokens * mlp_width(shape, i) for i in range(len(shape.layers)))
    scores = max(
        (e + 4 + batch.copy_size) * batch.probabilities(layer) for layer in shape.attention
    )
    return max(mlp, scores) + batch.causal_mask


def logits(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes of a chunk's logits, in the model's dtype and in fp32, and of all tokens' hidden states."""
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, buffers=1))
    return (
        chunk * shape.vocab_size * (4 + batch.copy_size)
        + 2 * batch.tokens * shape.hidden_size * batch.element_size
    )


def mlp_width(shape: ModelShape, layer: int) -> int:
    """Counts the channels in the MLP of a layer that one token uses at the same time."""
    counts, mixture = shape.counts[layer], shape.mixture
    chosen = mixture.experts_per_token * mixture.expert_size if mixture and counts["experts"] else 0
    whole = (linear.matrix for linear in shape.layers[layer].linears if not linear.spans)
    widths = (rows if columns == shape.hidden_size else columns for rows, columns in whole)
    return max(counts.get("channels", 0), chosen, *widths)


def saved_in_layer(request: Request, shape: ModelShape, index: int, batch: PlannedBatch) -> int:
    """Returns the bytes that autograd keeps for a layer without checkpointing."""
    chosen, fields = shape.family.around(shape.config, index)
    few = config_of_layers(request.source, shape, chosen) | fields
    few.pop(shape.family.per_layer, None)
    stored, lora = (request.config.model.dtype, request.int8), request.config.lora
    return _saved(json.dumps(few), shape.only(chosen), chosen.index(index), batch, *stored, lora)


@cache
def _saved(
    text: str,
    shape: ModelShape,
    index: int,
    batch: PlannedBatch,
    dtype: Dtype,
    int8: bool,
    lora: LoraConfig,
) -> int:
    """Counts the storages that a layer saves, including its input, excluding the shared rotary angles."""
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    causal_lm: Any = build_on_meta(json.loads(text), "eager" if batch.eager else FUSED)
    shrink_on_meta(causal_lm, shape)
    if int8:
        store_as_int8(causal_lm, shape)
    with torch.device("meta"):
        model = add_lora(causal_lm, shape, lora, seed=0)
    model.to(device="meta", dtype=DTYPES[dtype]).train()
    for of_layer, spec in zip(decoder_layers(model), shape.layers, strict=True):
        for parameter in (base_parameter(of_layer, x.name) for x in spec.tensors if x.keep_fp32):
            parameter.data = parameter.float()
    kept, others = list[Tensor](), list[Tensor](model.parameters())

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def enter(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        others.extend(
            x for x in pytree.tree_leaves((positional[1:], named)) if isinstance(x, Tensor)
        )
        hooks.__enter__()

    layer = decoder_layers(model)[index]
    # the inputs come from embeddings, as in every layer but the first
    causal_lm.enable_input_require_grads()
    differentiate_input(layer)  # encoder and decoder embed tokens in separate modules
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    tokens = torch.zeros(batch.samples, batch.window, dtype=torch.int64, device="meta")
    # transformers uses a four-dimensional mask unchanged. It would inspect other masks, or ids without one.
    mask = tokens.new_empty(batch.samples, 1, batch.window, batch.window, dtype=torch.bool)
    decoder = (
        {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
        if shape.family.has_encoder
        else {}
    )
    causal_lm.base_model(input_ids=tokens, attention_mask=mask, use_cache=False, **decoder)
    apart = {tensor.untyped_storage()._cdata for tensor in others}
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept
    }
    return sum(count for key, count in storages.items() if key not in apart)


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Saves the same tensors as sdpa."""
    sliding, window = settings.get("sliding_window"), queries.shape[-2]
    bias = (
        None
        if settings.get("position_bias") is None
        else queries.new_empty(*queries.shape[:3], window)
    )
    # a mask as the queries, and keys and values per query head
    if sliding is not None and sliding <= window:
        keys, values = (
            x.repeat_interleave(queries.shape[1] // x.shape[1], dim=1) for x in (keys, values)
        )
        bias = queries.new_empty(len(queries), 1, window, window)
    if settings.get("indices") is not None:  # of the tokens that each query reads
        bias = queries.new_empty(len(queries), 1, window, window)
    out: Any = _FusedAttention.apply(queries, keys, values, bias)
    return out.transpose(1, 2).contiguous(), None


class _FusedAttention(torch.autograd.Function):
    """Saves its inputs, the output and the fp32 log-sum-exp. All are (batch, heads, window, ...)."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        # with the memory layout of the queries, as on GPUs
        out = torch.empty_like(queries[..., : values.shape[-1]])
        ctx.save_for_backward(
            queries, keys, values, mask, out, torch.empty_like(queries[..., 0], dtype=torch.float32)
        )
        return out
