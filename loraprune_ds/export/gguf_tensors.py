"""The tensors of a GGUF file: their names, and their values as llama.cpp wants them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, get_tensor_name_map, quants
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH_NAMES

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_architecture import PARTS, Architecture
from loraprune_ds.export.gguf_experts import Blocks, expert_parts, latent_parts
from loraprune_ds.export.gguf_tokenizer import FORMATS_LEFT
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shapes import ModelShape, Pieces

Array = np.ndarray[Any, Any]
Precision = Literal["f16", "q8_0"]
MATRIX_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
ROUTER, SHARED_GATE = ".ffn_gate_inp", ".ffn_gate_inp_shexp"
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")


@dataclass(frozen=True)
class GgufTensor:
    """Describes one tensor of the file.

    Attributes:
        source: its name in the pretrained model.
        name: its name in the GGUF file.
        shape: (out_features, in_features) or (n,).
        type: how it is stored.
        start: its first element in the row-major flat view of the source. A fused linear comes as several tensors.
        blocks: where it is in the source, if it has a block for each expert or head.
        heads: query or key heads whose rows must be put in llama.cpp's order. 0 for all other tensors.
        offset, factor: values are stored as (value + offset) · factor.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int = 0
    blocks: Blocks | None = None
    heads: int = 0
    offset: float = 0.0
    factor: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.numel // block * block_bytes


def plan_tensors(
    architecture: Architecture, config: Any, shape: ModelShape, precision: Precision, where: str
) -> list[GgufTensor]:
    """Plans all tensors, in the order they are written. Matrices get `precision`. Norms and biases stay fp32.

    Names are those of gguf-py's own map for the architecture.

    Args:
        config: an object of transformers, with all defaults.

    Raises:
        UserError: the architecture has no place for a tensor. The line names `where` and the tensor.
    """
    arch = architecture.of(shape)
    names = get_tensor_name_map(arch, len(shape.layers))
    tensors = []
    stored = shape.stored()
    for source, size in shape.parameters().items():
        for part, start, part_size, blocks in _parts(source, size, shape, architecture):
            if part == source:
                part = _on_disk(source, stored)
            name = names.get_name(part, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(
                    f"{where}: llama.cpp's {MODEL_ARCH_NAMES[arch]} has no place for {part}; {FORMATS_LEFT}"
                )
            if SHARED_GATE in name:  # a vector there
                part_size = part_size[1:]
            module = part.rpartition(".")[0]
            inner = module.split(".", 3)[-1] if module.startswith("model.layers.") else module
            tensors.append(
                GgufTensor(
                    source,
                    name,
                    part_size,
                    _type(name, part_size, precision),
                    start=start,
                    blocks=blocks,
                    heads=part_size[0] // shape.head_dim if architecture.neighbours and inner in ROTARY else 0,
                    offset=architecture.norm_offset if inner.endswith("norm") else 0.0,
                    factor=architecture.attention_factor(config, shape) if inner == architecture.scaled else 1.0,
                )
            )
    return tensors


def _parts(
    source: str, size: tuple[int, ...], shape: ModelShape, architecture: Architecture
) -> Iterator[tuple[str, int, tuple[int, ...], Blocks | None]]:
    """Splits a fused tensor. Yields of each part its name, its first element in the whole, and its shape.

    Of what has blocks it yields where they are in the whole besides.
    """
    if source.startswith("model.layers."):
        found = (*expert_parts(source, size, shape, architecture.in_turn), *latent_parts(source, shape))
        yield from ((name, 0, part_size, blocks) for name, part_size, blocks in found)
        if found:
            return
    linears = {linear.name: linear for linear in shape.family.linears}
    for fused, parts in PARTS.items():
        if fused in linears and f".{fused}." in source:
            start = 0
            layer = int(source.split(".")[2])
            for part, rows in zip(parts, shape.part_sizes(layer, linears[fused].parts), strict=True):
                yield source.replace(fused, part), start, (rows, *size[1:]), None
                start += math.prod((rows, *size[1:]))
            return
    yield source, 0, size, None


def read_tensor(pretrained: PretrainedModel, tensor: GgufTensor) -> Array:
    """Reads a tensor as it lies in the GGUF file. Blocks of Q8_0 come as bytes.

    Raises:
        UserError: a value is beyond what its type can hold. The line names file and tensor.
    """
    read = partial(pretrained.read_flat, tensor.source, dtype=torch.float32)
    flat = tensor.blocks.read(read) if tensor.blocks else read(tensor.start, tensor.start + tensor.numel)
    values = flat.view(tensor.shape).numpy()
    if tensor.heads:
        values = permute(values, tensor.heads)
    if (tensor.offset, tensor.factor) != (0.0, 1.0):
        values = (values + np.float32(tensor.offset)) * np.float32(tensor.factor)
    if tensor.type is GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        where = f"{pretrained.files[tensor.source]}: {tensor.source}"
        raise UserError(f"{where} has values beyond 65504, the largest of f16; {FORMATS_LEFT}")
    return quants.quantize(values, tensor.type)


def permute(rows: Array, heads: int) -> Array:
    """Puts the rows (heads * head_dim, ...) of q_proj or k_proj in llama.cpp's order.

    The two rows of a rotary pair lie half a head apart in transformers. They lie side by side in llama.cpp's `llama`
    and its kin.
    """
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def _on_disk(source: str, stored: Mapping[str, Pieces]) -> str:
    """Returns the name in weight files, which gguf-py knows. Sinks are a weight there, and a correction is a bias."""
    name = stored[source].names[0] if source in stored else source
    name = name.replace(CORRECTION, CORRECTION.replace("_bias", ".bias"))
    return name if name.endswith((".weight", ".bias")) else f"{name}.weight"


def _type(name: str, size: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    """Returns how a tensor is stored. Routers and the biases of experts stay fp32, like all vectors."""
    if len(size) == 1 or ROUTER in name or name.endswith(".bias"):
        return GGMLQuantizationType.F32
    wanted = MATRIX_TYPES[precision]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if size[-1] % block == 0 else GGMLQuantizationType.F16
