"""Writes a pruned model as one GGUF file for llama.cpp."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType, quants
from gguf.constants import GGML_QUANT_SIZES

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_tokenizer import FORMATS_LEFT, add_tokenizer
from loraprune_ds.model.embedded import LAYER_NAMES, OUTER_NAMES
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.family import family_name
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shapes import ModelShape

Array = np.ndarray[Any, Any]
Precision = Literal["f16", "q8_0"]
FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
MATRIX_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
ROPE_TYPES = ("default", "linear", "llama3")
ROPE_FREQS = "rope_freqs.weight"
DEFAULT_EPSILON = 1e-6  # of LlamaConfig and MistralConfig

# Our names of the modules -> GGUF's. Those of a layer come after `blk.<i>.`.
NAMES_OUTSIDE = {ours: theirs for theirs, ours in OUTER_NAMES.items()} | {"lm_head": "output"}
NAMES_IN_LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


# Other architectures want other names, norms minus 1 or rotary pairs in another order, and would be wrong silently.
CHECKED_FAMILIES = ("llama", "mistral")


@dataclass(frozen=True)
class GgufTensor:
    """Describes one tensor of the file.

    Attributes:
        source: its name in the pretrained model.
        name: its name in the GGUF file.
        shape: (out_features, in_features) or (n,), the same in both.
        type: how it is stored.
        heads: query or key heads whose rows must be put in llama.cpp's order. 0 for all other tensors.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int = 0

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def write_gguf(pretrained: PretrainedModel, path: Path, precision: Precision, name: str) -> list[str]:
    """Converts a merged model tensor by tensor. No more than one tensor is in memory.

    Args:
        name: the model's name in the file.

    Returns:
        Lines that a person should know about the file.

    Raises:
        UserError: GGUF cannot hold something of the model or its tokenizer. The line says what, and which formats can.
    """
    shape, folder = pretrained.shape, pretrained.folder
    if family_name(shape.model_type) not in CHECKED_FAMILIES:
        checked = " and ".join(CHECKED_FAMILIES)
        raise UserError(
            f"{folder}: GGUF is checked in llama.cpp for {checked} alone, not for {shape.model_type}; {FORMATS_LEFT}"
        )
    config = export_config(pretrained.config, shape, "float32").config  # with the defaults that config.json leaves out
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{folder}: GGUF cannot hold hidden_act {activation!r}; {FORMATS_LEFT}")
    logging.getLogger("gguf").setLevel(logging.WARNING)  # else it tells every step
    writer = GGUFWriter(path, architecture(shape))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    remarks = _add_context(writer, config)
    _add_sizes(writer, shape)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", DEFAULT_EPSILON))
    rope_factors = _add_rope(writer, config["rope_parameters"], shape.head_dim, folder)
    add_tokenizer(writer, folder, shape.vocab_size)
    tensors = plan_tensors(shape, precision)
    _write(writer, pretrained, tensors, rope_factors)
    return remarks + _tell_f16(tensors, precision)


def architecture(shape: ModelShape) -> str:
    """Returns llama.cpp's name of the architecture. In `deci` the layers may differ in size."""
    return "llama" if shape.is_uniform else "deci"


def plan_tensors(shape: ModelShape, precision: Precision) -> list[GgufTensor]:
    """Plans all tensors, in the order they are written. Matrices get `precision`. Norms and biases stay fp32."""
    return [_plan_tensor(source, size, shape, precision) for source, size in shape.parameters().items()]


def read_tensor(pretrained: PretrainedModel, tensor: GgufTensor) -> Array:
    """Reads a tensor as it lies in the GGUF file. Blocks of Q8_0 come as bytes.

    Raises:
        UserError: a value is beyond what its type can hold. The line names file and tensor.
    """
    flat = pretrained.read_flat(tensor.source, 0, math.prod(tensor.shape), torch.float32)
    values = flat.view(tensor.shape).numpy()
    if tensor.heads:
        values = permute(values, tensor.heads)
    if tensor.type is GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        where = f"{pretrained.files[tensor.source]}: {tensor.source}"
        raise UserError(f"{where} has values beyond 65504, the largest of f16; {FORMATS_LEFT}")
    return quants.quantize(values, tensor.type)


def permute(rows: Array, heads: int) -> Array:
    """Puts the rows (heads * head_dim, ...) of q_proj or k_proj in llama.cpp's order.

    The two rows of a rotary pair lie half a head apart in transformers. They lie side by side in llama.cpp's `llama`
    and `deci`.
    """
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def llama3_factors(rope: dict[str, Any], head_dim: int) -> Array:
    """Returns the divisor of each rotary frequency under Llama 3.1's scaling: (head_dim / 2,), fp32.

    Long wavelengths are stretched by `factor`. Short ones are kept. Those between go smoothly from one to the other
    (rope_type "llama3" of transformers' modeling_rope_utils).
    """
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _add_context(writer: GGUFWriter, config: dict[str, Any]) -> list[str]:
    """Writes the context length, and says so if it is shorter than the model's.

    Within its sliding window a model attends to everything. llama.cpp has no window for these architectures.
    """
    positions, window = config["max_position_embeddings"], config.get("sliding_window")
    if window is None or window >= positions:
        writer.add_context_length(positions)
        return []
    writer.add_context_length(window)
    return [f"context length {window:,}, the sliding window: llama.cpp attends to all earlier tokens"]


def _add_sizes(writer: GGUFWriter, shape: ModelShape) -> None:
    heads = [layer["heads"] for layer in shape.layers]
    queries = [shape.query_heads(layer) for layer in shape.layers]
    channels = [layer["channels"] for layer in shape.layers]
    writer.add_block_count(len(shape.layers))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_head_count(queries[0] if shape.is_uniform else queries)
    writer.add_head_count_kv(heads[0] if shape.is_uniform else heads)
    writer.add_feed_forward_length(channels[0] if shape.is_uniform else channels)
    # Without these llama.cpp takes hidden_size / heads, which is wrong after a cut.
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)


def _add_rope(writer: GGUFWriter, rope: dict[str, Any], head_dim: int, folder: Path) -> Array | None:
    """Writes the rotary settings. Returns the tensor `rope_freqs.weight` if the scaling needs one.

    Args:
        rope: `rope_parameters` of the config.

    Raises:
        UserError: GGUF files of these models cannot hold the scaling. The line names `folder`.
    """
    rope_type = rope["rope_type"]
    if rope_type not in ROPE_TYPES or "partial_rotary_factor" in rope:
        what = f"rope scaling {rope_type}" if rope_type not in ROPE_TYPES else "a partial rotary embedding"
        raise UserError(f"{folder}: GGUF cannot hold {what} ({', '.join(ROPE_TYPES)} it can); {FORMATS_LEFT}")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope_type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return llama3_factors(rope, head_dim) if rope_type == "llama3" else None


def _plan_tensor(source: str, size: tuple[int, ...], shape: ModelShape, precision: Precision) -> GgufTensor:
    module, _, suffix = source.rpartition(".")  # suffix: weight or bias
    stored_as = _type(size, precision)
    if module in NAMES_OUTSIDE:
        return GgufTensor(source, f"{NAMES_OUTSIDE[module]}.{suffix}", size, stored_as)
    _, _, layer, inner = module.split(".", 3)
    counts = shape.layers[int(layer)]
    rotary = {"self_attn.q_proj": shape.query_heads(counts), "self_attn.k_proj": counts["heads"]}
    return GgufTensor(source, f"blk.{layer}.{NAMES_IN_LAYER[inner]}.{suffix}", size, stored_as, rotary.get(inner, 0))


def _type(size: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    if len(size) == 1:
        return GGMLQuantizationType.F32
    wanted = MATRIX_TYPES[precision]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if size[1] % block == 0 else GGMLQuantizationType.F16


def _write(
    writer: GGUFWriter, pretrained: PretrainedModel, tensors: list[GgufTensor], rope_factors: Array | None
) -> None:
    for tensor in tensors:
        # The data type only matters where no raw type is given.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    if rope_factors is not None:
        writer.add_tensor_info(ROPE_FREQS, rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(read_tensor(pretrained, tensor))
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    writer.close()


def _tell_f16(tensors: list[GgufTensor], precision: Precision) -> list[str]:
    """Says how many matrices of a Q8_0 file stay f16."""
    wide = [t for t in tensors if precision == "q8_0" and t.type is GGMLQuantizationType.F16]
    if not wide:
        return []
    return [f"{len(wide)} tensors stay f16, their rows are no multiple of 32 (prune.channel_multiple: 32 avoids it)"]
