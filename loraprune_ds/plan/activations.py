"""Bytes of a micro-batch's activations: what a layer saves for its backward pass, and the widest places of a pass."""

import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import LoraConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.model.adapters import add_lora, base_parameter, differentiate_input
from loraprune_ds.model.classes import build_on_meta, decoder_layers, shrink_on_meta
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.logits import chunk_size
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.request import PlannedBatch, Request
from loraprune_ds.pretrained.fewer_layers import config_of_layers

FUSED = "planned"  # the name of our attention in transformers
Storages = dict[int, int]  # bytes by address


def activations(request: Request, shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the peak of a micro-batch, without logits."""
    hidden_numel = batch.tokens * shape.hidden_size
    hidden_states = batch.element_size * hidden_numel
    layer_count = len(shape.layers)
    layers = [saved_in_layer(request, shape, i, batch) for i in range(layer_count)]
    saved = sum(layers)
    if request.config.train.gradient_checkpointing:
        saved = layer_count * hidden_states + max(layers)
    # Gradients of the residual, and at the widest place: in the MLP, in eager attention (fp32), or in a norm (fp32).
    scores = 8 * _most_probabilities(shape, batch)
    widest = max(_widest_mlp(shape, batch), scores, 12 * hidden_numel)
    gradients = 2 * hidden_states + widest
    rotary_angles = 2 * batch.element_size * batch.window * shape.head_dim
    last_norm = hidden_states + 4 * hidden_numel + 4 * batch.tokens
    return saved + gradients + rotary_angles + batch.causal_mask + last_norm


def forward_temporaries(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes at the widest place of a pass without backward, in the MLP or in eager attention."""
    per_probability = batch.element_size + 4 + batch.copy_size
    scores = per_probability * _most_probabilities(shape, batch)
    return max(_widest_mlp(shape, batch), scores) + batch.causal_mask


def _widest_mlp(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes of the most channels that a token uses at the same time."""
    widths = [counts.get("channels", 0) for counts in shape.counts]
    if shape.mixture:
        widths.append(shape.mixture.experts_per_token * shape.mixture.expert_size)
    for _, linear in shape.linears():
        if not linear.spans:  # it is never cut
            rows, columns = linear.matrix
            widths.append(rows if columns == shape.hidden_size else columns)
    return 4 * batch.element_size * batch.tokens * max(widths)


def _most_probabilities(shape: ModelShape, batch: PlannedBatch) -> int:
    return batch.stored_pairs * max(layer.queries for layer in shape.attention)


def logits(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes of a chunk's logits, in the model's dtype and in fp32, and of all tokens' hidden states."""
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, buffers=1))
    hidden_states = 2 * batch.tokens * shape.hidden_size * batch.element_size
    return chunk * shape.vocab_size * (4 + batch.copy_size) + hidden_states


def saved_in_layer(request: Request, shape: ModelShape, index: int, batch: PlannedBatch) -> int:
    """Returns the bytes that autograd keeps for a layer without checkpointing."""
    layers, fields = shape.family.around(shape.config, index)
    source = config_of_layers(request.source, shape, layers) | fields
    source.pop(shape.family.per_layer, None)
    config = request.config
    return _saved(
        json.dumps(source),
        shape.only(layers),
        layers.index(index),
        batch,
        config.model.dtype,
        config.lora,
        request.is_local,
    )


@cache
def _saved(
    source: str,
    shape: ModelShape,
    index: int,
    batch: PlannedBatch,
    dtype: Dtype,
    lora: LoraConfig,
    fp32_lora: bool,
) -> int:
    """Counts the storages that a layer saves, including its input, excluding the shared rotary angles."""
    ALL_ATTENTION_FUNCTIONS.register(FUSED, _fused_attention)
    model: Any = build_on_meta(json.loads(source), "eager" if batch.eager else FUSED)
    shrink_on_meta(model, shape)
    with torch.device("meta"):
        add_lora(model, shape, lora, seed=0)
    model.to(device="meta", dtype=DTYPES[dtype]).train()
    for parameter in model.parameters():
        if parameter.requires_grad and fp32_lora:
            parameter.data = parameter.data.float()
    for layer, spec in zip(decoder_layers(model), shape.layers, strict=True):
        for tensor in spec.tensors:
            if tensor.keep_fp32:
                parameter = base_parameter(layer, tensor.name)
                parameter.data = parameter.float()
    saved, shared = _run_layer(model, index, batch, has_encoder=shape.family.has_encoder)
    shared |= _storages(model.parameters())
    return sum(count for storage, count in saved.items() if storage not in shared)


def _run_layer(
    model: Any, index: int, batch: PlannedBatch, *, has_encoder: bool
) -> tuple[Storages, Storages]:
    """Runs the model, and returns the storages that a layer saves, and those of its inputs from outside."""
    saved: list[Tensor] = []
    inputs: list[Tensor] = []  # except the hidden states

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)

    def enter(_: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((positional[1:], named))
        inputs.extend(leaf for leaf in leaves if isinstance(leaf, Tensor))
        hooks.__enter__()

    layer = decoder_layers(model)[index]
    # the inputs come from embeddings, as in every layer but the first
    model.enable_input_require_grads()
    differentiate_input(layer)  # encoder and decoder embed tokens in separate modules
    layer.register_forward_pre_hook(enter, with_kwargs=True)
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    tokens = torch.zeros(batch.samples, batch.window, dtype=torch.int64, device="meta")
    # transformers uses a four-dimensional mask unchanged. It would inspect other masks, or ids without one.
    mask = tokens.new_empty(batch.samples, 1, batch.window, batch.window, dtype=torch.bool)
    arguments = {"input_ids": tokens, "attention_mask": mask}
    if has_encoder:
        arguments |= {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
    model.base_model(use_cache=False, **arguments)
    return _storages(saved), _storages(inputs)


def _storages(tensors: Iterable[Tensor]) -> Storages:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _fused_attention(
    module: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """Saves the same tensors as sdpa."""
    sliding = settings.get("sliding_window")
    window = queries.shape[-2]
    slides = sliding is not None and sliding <= window
    if slides:  # keys and values per query head
        repeats = queries.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(repeats, dim=1)
        values = values.repeat_interleave(repeats, dim=1)
    bias = None
    if slides or settings.get("indices") is not None:  # a mask, or the tokens that each query reads
        bias = queries.new_empty(len(queries), 1, window, window)
    elif settings.get("position_bias") is not None:
        bias = queries.new_empty(*queries.shape[:3], window)
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
        log_sum_exp = torch.empty_like(queries[..., 0], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, mask, out, log_sum_exp)
        return out
