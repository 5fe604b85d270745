"""The weights of a checkpoint under llama.cpp's names and in its types, one tensor at a time."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from loraprune_ds.errors import UserError
from loraprune_ds.model.embedded import LAYER_NAMES
from loraprune_ds.model.pretrained import PretrainedModel, parameter_shapes
from loraprune_ds.model.shapes import ModelShape

Precision = Literal["f16", "q8_0"]
MATRIX_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}

OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NAMES_IN_LAYER = {ours: theirs for theirs, ours in LAYER_NAMES.items()}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        source: its name in the checkpoint.
        name: its name in the GGUF file.
        shape: (out_features, in_features) or (n,), the same in both.
        type: how it is stored.
        heads: query or key heads whose rows have to be put in llama.cpp's order; 0 for all other tensors.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    heads: int = 0

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // block * block_bytes


def plan_tensors(shape: ModelShape, precision: Precision) -> list[GgufTensor]:
    """All tensors, in the order they are written. Matrices get `precision`, norms and biases stay fp32."""
    return [_plan(source, size, shape, precision) for source, size in parameter_shapes(shape).items()]


def _plan(source: str, size: tuple[int, ...], shape: ModelShape, precision: Precision) -> GgufTensor:
    module, _, kind = source.rpartition(".")
    if module in OUTER_NAMES:
        name, heads = f"{OUTER_NAMES[module]}.{kind}", 0
    else:
        _, _, index, inner = module.split(".", 3)
        name, heads = f"blk.{index}.{NAMES_IN_LAYER[inner]}.{kind}", _rotary_heads(inner, int(index), shape)
    return GgufTensor(source, name, size, _type(size, precision), heads)


def _rotary_heads(module: str, layer: int, shape: ModelShape) -> int:
    key_heads = shape.layers[layer].heads
    return {"self_attn.q_proj": key_heads * shape.queries_per_group, "self_attn.k_proj": key_heads}.get(module, 0)


def _type(size: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    if len(size) == 1:
        return GGMLQuantizationType.F32
    wanted = MATRIX_TYPES[precision]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if size[1] % block == 0 else GGMLQuantizationType.F16


def read_tensor(pretrained: PretrainedModel, tensor: GgufTensor) -> np.ndarray[Any, Any]:
    """The tensor as it lies in the file; blocks of Q8_0 come as bytes.

    Raises:
        UserError: a value is beyond what its type can hold; names file and tensor.
    """
    flat = pretrained.read_flat(tensor.source, 0, int(np.prod(tensor.shape)), torch.float32)
    values = flat.view(tensor.shape).numpy()
    if tensor.heads:
        values = permute(values, tensor.heads)
    if tensor.type is GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        where = f"{pretrained.files[tensor.source]}: {tensor.source}"
        raise UserError(f"{where} has values beyond 65504, the largest of f16; formats that can: hf, adapter")
    return quants.quantize(values, tensor.type)


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows (heads * head_dim, ...) from rotary pairs half a head apart, as transformers has them, to pairs side by
    side, as llama.cpp's `llama` and `deci` have them."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))
