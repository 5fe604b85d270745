"""Writes a pruned model as one GGUF file for llama.cpp."""

import logging
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from gguf.quants import quant_shape_to_byte_shape

from loraprune_ds.export.gguf_architecture import (
    GROUPS,
    NUMBERS,
    Architecture,
    NotInGguf,
    Precision,
    architecture_of,
    attention_interval,
)
from loraprune_ds.export.gguf_tensors import Array, GgufTensor, plan_tensors, read_tensor
from loraprune_ds.export.gguf_tokenizer import add_tokenizer
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import config_object, sliding_window
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import PretrainedModel


def write_gguf(
    pretrained: PretrainedModel, path: Path, precision: Precision, name: str
) -> list[str]:
    """Converts a merged model, with one tensor in memory at a time. Returns remarks for the user.

    Args:
        name: the model's name in the file.
    """
    shape = pretrained.shape
    folder = str(pretrained.folder)
    config: Any = config_object(pretrained.config)  # with the defaults that config.json omits
    architecture, arch = architecture_of(config, shape, folder)
    tensors = plan_tensors(architecture, arch, config, shape, precision, folder)
    logging.getLogger("gguf").setLevel(logging.WARNING)  # otherwise it logs every step
    writer = GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{precision.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    remarks = _add_context(writer, config, architecture)
    _add_sizes(writer, config, shape, architecture)
    methods = NUMBERS | GROUPS if architecture.grouped else NUMBERS
    for key, method in methods.items():
        value = getattr(config, key, None)
        if value is not None:
            getattr(writer, method)(value)
    factors = _add_rope(writer, config, shape.head_dim, architecture, folder)
    remarks += add_tokenizer(writer, pretrained.folder, shape.vocab_size)
    _write(writer, pretrained, tensors, factors)
    f16_count = sum(tensor.type is GGMLQuantizationType.F16 for tensor in tensors)
    if f16_count and precision == "q8_0":
        remarks.append(
            f"{f16_count} tensors stay f16, because their rows are no multiple of 32 "
            "(prune.channel_multiple: 32 avoids that)"
        )
    return remarks


def llama3_factors(rope: JsonObject, head_dim: int) -> Array:
    """Returns the divisor of each rotary frequency under Llama 3.1's scaling: (head_dim / 2,), fp32.

    Long wavelengths are stretched by `factor`, short ones are kept, and between them the factor changes smoothly
    (rope_type "llama3" of transformers' modeling_rope_utils).
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    wavelengths = 2 * math.pi * rope["rope_theta"] ** exponents
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    scale = (1 - smooth) / rope["factor"] + smooth
    return (1 / scale).astype(np.float32)


def _add_context(writer: GGUFWriter, config: Any, architecture: Architecture) -> list[str]:
    """Writes the context length, limited by the sliding window if the architecture has none."""
    positions = config.max_position_embeddings
    window = sliding_window(config)
    if architecture.window_period:
        writer.add_sliding_window(int(config.sliding_window))
    if architecture.window_period or window is None or window >= positions:
        writer.add_context_length(positions)
        return []
    writer.add_context_length(window)
    return [
        f"context length {window:,}, the sliding window, because llama.cpp attends to all earlier tokens"
    ]


def _add_sizes(
    writer: GGUFWriter, config: Any, shape: ModelShape, architecture: Architecture
) -> None:
    mixture = shape.mixture
    writer.add_block_count(len(shape.layers))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    queries = [attention.queries for attention in shape.attention]
    # a delta net has no heads
    writer.add_head_count(max(queries) if shape.is_uniform else queries)
    heads = [layer.key_value_heads for layer in shape.layers]
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        writer.add_head_count_kv(1)  # all heads share it
    else:
        is_one_number = shape.is_uniform and not architecture.short
        writer.add_head_count_kv(max(heads) if is_one_number else heads)
    channels = _channels(config, shape)
    writer.add_feed_forward_length(channels[0] if shape.is_uniform else channels)
    if mixture:
        writer.add_expert_count(shape.counts[-1]["experts"])
        writer.add_expert_used_count(mixture.experts_per_token)
        writer.add_expert_feed_forward_length(mixture.expert_size)
        shared = getattr(config, "moe_num_shared_experts", 0)
        if shared:
            writer.add_expert_shared_feed_forward_length(shared * mixture.expert_size)
    if architecture.gating:
        writer.add_expert_gating_func(ExpertGatingFuncType[architecture.gating])
        dense_layers = sum(layer["experts"] == 0 for layer in shape.counts)
        writer.add_leading_dense_block_count(dense_layers)
    # By default llama.cpp takes hidden_size / heads, which is wrong after a cut.
    writer.add_key_length(latent + shape.head_dim if latent else shape.head_dim)
    writer.add_value_length(latent or shape.head_dim)
    if architecture.delta:
        writer.add_full_attention_interval(attention_interval(config))
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    if latent:
        writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
        writer.add_value_length_mla(config.v_head_dim)


def _channels(config: Any, shape: ModelShape) -> list[int]:
    """Returns the channels of each layer, or only one number if dense layers precede those with experts."""
    if any(layer.get("experts") == 0 for layer in shape.counts):
        return [config.intermediate_size]
    expert_size = shape.mixture.expert_size if shape.mixture else 0
    return [layer.get("channels", expert_size) for layer in shape.counts]


def _add_rope(
    writer: GGUFWriter, config: Any, head_dim: int, architecture: Architecture, where: str
) -> Array | None:
    """Writes `rope_parameters`, if it has them. Returns the tensor `rope_freqs.weight` if the scaling needs one."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return None
    # Gemma 3 has parameters for each kind of layer, and scales only full attention.
    full = rope.get("full_attention", rope)
    sliding = rope.get("sliding_attention")
    lacking = _lacking_rope(full, sliding, architecture)
    if lacking:
        raise NotInGguf(
            where, f"GGUF cannot hold {lacking} ({', '.join(architecture.ropes)} it can)"
        )
    rope_type = full["rope_type"]
    rotary_dim = int(head_dim * full.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotary_dim)
    writer.add_rope_freq_base(full["rope_theta"])
    # the pairs that rotate by time, height and width, which are equal in text
    if architecture.delta:
        pairs = rotary_dim // 2
        writer.add_rope_dimension_sections([(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0])
    if sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope_type))
        writer.add_rope_scaling_factor(full["factor"])
    if rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        scale = full.get("mscale_all_dim")  # of attention
        if scale:
            writer.add_rope_scaling_yarn_log_mul(0.1 * scale)
    return llama3_factors(full, head_dim) if rope_type == "llama3" else None


def _lacking_rope(
    full: JsonObject, sliding: JsonObject | None, architecture: Architecture
) -> str | None:
    """Names the rotary embedding of full or sliding attention that the architecture lacks, if any."""
    rope_type = full["rope_type"]
    if full.get("partial_rotary_factor", 1.0) != 1.0 and not architecture.partial:
        return "a partial rotary embedding"
    if full.get("mscale") != full.get("mscale_all_dim"):
        return f"rope scaling {rope_type} of its own mscale"
    if rope_type not in architecture.ropes or (sliding and sliding["rope_type"] != "default"):
        return f"rope scaling {rope_type}"
    return None


def _write(
    writer: GGUFWriter,
    pretrained: PretrainedModel,
    tensors: list[GgufTensor],
    factors: Array | None,
) -> None:
    for tensor in tensors:
        nbytes = math.prod(quant_shape_to_byte_shape(tensor.shape, tensor.type))
        # The data type matters only without a raw type.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, tensor.type)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(read_tensor(pretrained, tensor))
        if factors is not None:
            writer.write_tensor_data(factors)
