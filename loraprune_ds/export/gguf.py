"""A pruned model as one GGUF file for llama.cpp: arch `llama`, or `deci` where the layers differ in size."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_rope import add_rope
from loraprune_ds.export.gguf_tensors import Precision, plan_tensors, read_tensor
from loraprune_ds.export.gguf_tokenizer import add_tokenizer
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shapes import ModelShape

FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
ROPE_FREQS = "rope_freqs.weight"
DEFAULT_EPSILON = 1e-6  # of LlamaConfig and MistralConfig


def write_gguf(source: PretrainedModel, path: Path, precision: Precision, name: str) -> list[str]:
    """Converts a merged Hugging Face checkpoint, tensor by tensor: no more than one is in memory.

    Args:
        name: the model's name in the file.

    Returns:
        Lines that a person should know about the file.

    Raises:
        UserError: the model or its tokenizer has something that GGUF cannot hold; says what, and which formats can.
    """
    shape = source.shape
    config = export_config(source.config, shape, "float32").config  # with the defaults that config.json may leave out
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"{source.folder}: GGUF cannot hold hidden_act {activation!r}; formats that can: hf, adapter")
    logging.getLogger("gguf").setLevel(logging.WARNING)  # says what it does, step by step
    writer = GGUFWriter(path, "llama" if shape.is_uniform else "deci")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[precision])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    remarks = _add_context(writer, config)
    _add_sizes(writer, shape)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", DEFAULT_EPSILON))
    rope_factors = add_rope(writer, config["rope_parameters"], shape.head_dim, str(source.folder))
    add_tokenizer(writer, source.folder, shape.vocab_size)
    return remarks + _write(writer, source, precision, rope_factors)


def _add_context(writer: GGUFWriter, config: dict[str, Any]) -> list[str]:
    """Within its sliding window a model attends to everything, and llama.cpp has no window for these architectures."""
    positions, window = config["max_position_embeddings"], config.get("sliding_window")
    if window is None or window >= positions:
        writer.add_context_length(positions)
        return []
    writer.add_context_length(window)
    return [f"context length {window:,}, the sliding window: llama.cpp attends to all earlier tokens"]


def _add_sizes(writer: GGUFWriter, shape: ModelShape) -> None:
    heads = [layer.heads for layer in shape.layers]
    queries = [layer.heads * shape.queries_per_group for layer in shape.layers]
    channels = [layer.channels for layer in shape.layers]
    writer.add_block_count(len(shape.layers))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_head_count(queries[0] if shape.is_uniform else queries)
    writer.add_head_count_kv(heads[0] if shape.is_uniform else heads)
    writer.add_feed_forward_length(channels[0] if shape.is_uniform else channels)
    # Otherwise hidden_size / heads, which pruning has made untrue.
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)


def _write(
    writer: GGUFWriter, source: PretrainedModel, precision: Precision, rope_factors: np.ndarray[Any, Any] | None
) -> list[str]:
    tensors = plan_tensors(source.shape, precision)
    for tensor in tensors:
        # The data type only matters where no raw type is given.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
    if rope_factors is not None:
        writer.add_tensor_info(ROPE_FREQS, rope_factors.shape, rope_factors.dtype, rope_factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(read_tensor(source, tensor))
    if rope_factors is not None:
        writer.write_tensor_data(rope_factors)
    writer.close()
    wide = [t for t in tensors if precision == "q8_0" and t.type is GGMLQuantizationType.F16]
    if not wide:
        return []
    return [f"{len(wide)} tensors stay f16, their rows are no multiple of 32 (prune.channel_multiple: 32 avoids it)"]
