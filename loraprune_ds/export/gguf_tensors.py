"""The tensors of a GGUF file: their names, and their values in llama.cpp's layout.

llama.cpp splits fused linears. Gate and up are separate, each for all experts of a layer. So are the rows of keys and
values in `kv_b_proj`. The rows of keys are transposed, because queries are multiplied by them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor

from loraprune_ds.export.gguf_architecture import PARTS, ROTARY, Architecture, NotInGguf, Precision
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.frozen import Pieces
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import PretrainedModel

Array = np.ndarray[Any, Any]
Step = Callable[[Array], Array]
ROUTER = ".ffn_gate_inp"
SHARED_GATE = ".ffn_gate_inp_shexp"
CONVOLUTIONS = (".ssm_conv1d", ".shortconv.conv")
DELTA_NET = "linear_attn."
GATED_NORM = "linear_attn.norm"
A_LOG = ".A_log"
BIAS = "_proj_bias"  # end of the names of biases with a row per expert
# A part of a name in weight files -> as gguf-py knows it.
ON_DISK = {
    CORRECTION: CORRECTION.replace("_bias", ".bias"),
    "dt_bias": "dt_proj.bias",
    "shared_mlp.output_linear": "mlp.down_proj",
}
# The last name of a stack -> its parts in llama.cpp. A stock GGUF converter gives the tensors these names, too.
EXPERT_PARTS = {
    "gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "down": ("mlp.experts.down_proj",),
}


class SourcePart(NamedTuple):
    """A part of a source tensor that is a tensor in llama.cpp: the same slice of each matrix in a sequence of them."""

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, ...]  # shape of one matrix in the source
    take: tuple[slice, ...] = ()  # slices along its axes, after it was transposed
    count: int = 1  # matrices, one per expert or head
    transposed: bool = False  # transposes each matrix

    def read(self, read_flat: Callable[[int, int], Tensor]) -> Tensor:
        """Reads the part. `read_flat`: (start, end) -> these elements of the source."""
        numel = math.prod(self.matrix)
        slices: list[Tensor] = []
        for i in range(self.count):
            matrix = read_flat(i * numel, (i + 1) * numel).view(self.matrix)
            if self.transposed:
                matrix = matrix.T
            slices.append(matrix[self.take])
        # A stack copies, so one slice is not stacked.
        values = torch.stack(slices) if len(slices) > 1 else slices[0]
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    source: str  # name in the pretrained model
    name: str
    shape: tuple[int, ...]  # (out_features, in_features), perhaps with experts first, or (n,)
    type: GGMLQuantizationType
    part: SourcePart  # that it stores
    steps: tuple[Step, ...]  # from its values to those of llama.cpp


def plan_tensors(
    architecture: Architecture,
    arch: str,
    config: Any,
    shape: ModelShape,
    precision: Precision,
    where: str,
) -> list[GgufTensor]:
    """Plans all tensors in file order, under gguf-py's names. Matrices get `precision`. Norms and biases stay fp32."""
    pieces = shape.pieces()
    keys = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(keys[arch], len(shape.layers))
    tensors: list[GgufTensor] = []
    for prefix, spec in shape.tensors():
        source = prefix + spec.name
        for part in _parts(prefix, spec, config, architecture.in_turn):
            part_name = _on_disk(source, pieces) if part.name == source else part.name
            name = names.get_name(part_name, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise NotInGguf(where, f"llama.cpp's {arch} has no place for {part_name}")
            part_shape = _shape_in_file(name, part.shape)
            part_type = _type(name, part_shape, precision)
            module = part_name.removeprefix(prefix).rpartition(".")[0]
            steps = tuple(_steps(spec, module, architecture, config, shape))
            tensors.append(GgufTensor(source, name, part_shape, part_type, part, steps))
    return tensors


def _shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drops the axes of size 1 that a shared expert's gate and convolutions lack in llama.cpp."""
    if any(convolution in name for convolution in CONVOLUTIONS):
        return (shape[0], *shape[2:])
    return shape[1:] if SHARED_GATE in name else shape


def read_tensor(pretrained: PretrainedModel, tensor: GgufTensor) -> Array:
    """Reads a tensor in the layout of the GGUF file. Q8_0 gives bytes."""
    read = partial(pretrained.weights.read_flat, tensor.source, dtype=torch.float32)
    values: Array = tensor.part.read(read).view(tensor.shape).numpy()
    for step in tensor.steps:
        values = step(values)
    limit = np.finfo(np.float16).max
    if tensor.type is GGMLQuantizationType.F16 and np.abs(values).max() > limit:
        file = pretrained.weights.files[tensor.source]
        raise NotInGguf(file, f"{tensor.source} has values beyond 65504, the limit of f16")
    return quants.quantize(values, tensor.type)


def permute(rows: Array, head_dim: int) -> Array:
    """Puts the rows (heads * head_dim, ...) of q_proj or k_proj in the order of llama.cpp's `llama` and similar ones.

    The two rows of a rotary pair are half a head apart in transformers, and adjacent in llama.cpp.
    """
    split = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def tile(values: Array, keys: int, each: int, start: int, columns: bool) -> Array:
    """Puts the value heads of a gated delta net in the order of llama.cpp: the first of each key head, then the second.

    Args:
        each: adjacent value heads per key head.
        start: rows before the heads.
        columns: the heads are columns, not rows.
    """
    rows = values.T if columns else values
    width = rows.shape[1:]
    heads = rows[start:].reshape(keys, each, -1, *width)
    in_turn = heads.swapaxes(0, 1).reshape(-1, *width)
    tiled = np.concatenate([rows[:start], in_turn])
    return np.ascontiguousarray(tiled.T if columns else tiled)


def shift(values: Array, offset: float, factor: float) -> Array:
    return (values + np.float32(offset)) * np.float32(factor)


def _steps(
    spec: TensorSpec, module: str, architecture: Architecture, config: Any, shape: ModelShape
) -> Iterator[Step]:
    """Yields the changes of the values of a tensor. `module` is the name of its module inside the layer."""
    if architecture.neighbours and module in ROTARY:
        yield partial(permute, head_dim=shape.head_dim)
    if DELTA_NET in spec.name and spec.spans:
        start = sum(run.size for run in spec.spans[:-1])  # queries and keys come before the values
        each = config.linear_num_value_heads // config.linear_num_key_heads
        keys = spec.spans[0].groups
        yield partial(tile, keys=keys, each=each, start=start, columns=spec.axis == 1)
    if spec.name.endswith(A_LOG):  # llama.cpp has -exp(value)
        yield lambda values: -np.exp(values)
    is_norm = module.endswith("norm") and module != GATED_NORM
    offset = architecture.norm_offset if is_norm else 0.0
    factor = 1.0
    if module == architecture.scaled:  # turns llama.cpp's attention scale into transformers'
        width = shape.head_dim
        if len(shape.layers) == architecture.odd_depth:
            width = shape.hidden_size // config.num_attention_heads
        factor = (width / config.query_pre_attn_scalar) ** 0.5
    if (offset, factor) != (0.0, 1.0):
        yield partial(shift, offset=offset, factor=factor)


def _parts(prefix: str, spec: TensorSpec, config: Any, in_turn: bool) -> Iterable[SourcePart]:
    """Returns the parts of a parameter that are tensors in llama.cpp. Most parameters are one part."""
    linear, _, last = spec.name.rpartition(".")
    if linear == "self_attn.kv_b_proj":
        return _latent_parts(prefix, spec, config.qk_nope_head_dim)
    if linear in PARTS:
        names = [f"{prefix}{part}.{last}" for part in PARTS[linear]]
        return _fused_parts(names, spec)
    if spec.stack or spec.name.endswith(BIAS):
        return _expert_parts(prefix, spec, in_turn)
    return [SourcePart(prefix + spec.name, spec.shape, spec.shape)]


def _latent_parts(prefix: str, spec: TensorSpec, keys: int) -> Iterator[SourcePart]:
    """Splits the projection of latent keys and values, of which `keys` rows of each head are keys."""
    heads = spec.spans[0].groups
    width = spec.spans[0].width
    rank = spec.shape[1]
    matrix = (width, rank)
    yield SourcePart(
        f"{prefix}self_attn.k_b_proj.weight",
        (heads, rank, keys),
        matrix,
        take=(slice(None), slice(0, keys)),
        count=heads,
        transposed=True,
    )
    yield SourcePart(
        f"{prefix}self_attn.v_b_proj.weight",
        (heads, width - keys, rank),
        matrix,
        take=(slice(keys, width),),
        count=heads,
    )


def _fused_parts(names: list[str], spec: TensorSpec) -> Iterator[SourcePart]:
    start = 0
    for name, run in zip(names, spec.spans, strict=True):
        end = start + run.size
        part_shape = (run.size, *spec.shape[1:])
        yield SourcePart(name, part_shape, spec.shape, take=(slice(start, end),))
        start = end


def _expert_parts(prefix: str, spec: TensorSpec, in_turn: bool) -> Iterator[SourcePart]:
    """Splits a stack of experts, or its biases. If `in_turn`, outputs of gate and up alternate."""
    experts = spec.spans[0].groups
    if spec.stack:  # the matrices of all experts, one below the other
        kind = "weight"
        matrix = (spec.shape[0] // experts, spec.shape[1])
        transposed = spec.stack.transposed
    else:  # a row for each expert
        kind = "bias"
        matrix = spec.shape[1:]
        transposed = False
    outputs, *inputs = reversed(matrix) if transposed else matrix
    names = EXPERT_PARTS[spec.linear.removesuffix(BIAS).rpartition(".")[2]]
    size = outputs // len(names)
    for i, name in enumerate(names):
        rows = slice(i, None, len(names)) if in_turn else slice(i * size, (i + 1) * size)
        yield SourcePart(
            f"{prefix}{name}.{kind}",
            (experts, size, *inputs),
            matrix,
            take=(rows,),
            count=experts,
            transposed=transposed,
        )


def _on_disk(source: str, pieces: Mapping[str, Pieces]) -> str:
    """Returns the name in weight files, as gguf-py knows it: sinks are a weight, corrections and steps are biases."""
    name = pieces[source].names[0] if source in pieces else source
    for ours, converters in ON_DISK.items():
        name = name.replace(ours, converters)
    return name if name.endswith((".weight", ".bias", A_LOG)) else f"{name}.weight"


def _type(name: str, size: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    """Returns the type that stores a tensor: fp32 for vectors, routers, convolutions and small biases."""
    is_small = any(part in name for part in (ROUTER, *CONVOLUTIONS))
    if is_small or len(size) == 1 or name.endswith(".bias"):
        return GGMLQuantizationType.F32
    matrix_type = GGMLQuantizationType[precision.upper()]
    block, _ = GGML_QUANT_SIZES[matrix_type]
    return matrix_type if size[-1] % block == 0 else GGMLQuantizationType.F16
