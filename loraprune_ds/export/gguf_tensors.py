"""The tensors of a GGUF file: their names, and their values in llama.cpp's layout.

llama.cpp splits fused linears. Gate and up are separate, each for all experts of a layer. So are the rows of keys and
values in `kv_b_proj`. The rows of keys are transposed, because queries are multiplied by them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_architecture import PARTS, ROTARY, Architecture
from loraprune_ds.export.gguf_tokenizer import FORMATS_LEFT
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.frozen import Pieces
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import PretrainedModel

Array = np.ndarray[Any, Any]
Step = Callable[[Array], Array]
Precision = Literal["f16", "q8_0"]
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
RELATIVE_BIAS = ".attn_rel_b"
ROUTER, SHARED_GATE = ".ffn_gate_inp", ".ffn_gate_inp_shexp"
CONVOLUTIONS = (".ssm_conv1d", ".shortconv.conv")
DELTA_NET, GATED_NORM, A_LOG = "linear_attn.", "linear_attn.norm", ".A_log"
BIAS = "_proj_bias"  # end of the names of biases with a row per expert
# The last name of a stack -> its parts in llama.cpp. A stock GGUF converter gives the tensors these names, too.
EXPERT_PARTS = {
    "gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "down": ("mlp.experts.down_proj",),
}


class SourcePart(NamedTuple):
    """A part of a source tensor that is a tensor in llama.cpp: the same slice of each matrix in a sequence of them."""

    name: str
    shape: tuple[int, ...]
    one: tuple[int, ...]  # shape of one matrix in the source
    take: tuple[slice, ...] = ()  # slices along its axes
    count: int = 1  # matrices, one per expert or head
    transposed: bool = False  # transposes each slice

    def read(self, read_flat: Callable[[int, int], Tensor]) -> Tensor:
        """Reads the part. `read_flat`: (start, end) -> these elements of the source."""
        numel = math.prod(self.one)
        parts = (
            read_flat(i * numel, (i + 1) * numel).view(self.one)[self.take]
            for i in range(self.count)
        )
        parts = [part.T if self.transposed else part for part in parts]
        return (torch.stack(parts) if len(parts) > 1 else parts[0]).reshape(self.shape)


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
    arch: MODEL_ARCH,
    config: Any,
    shape: ModelShape,
    precision: Precision,
    where: str,
) -> list[GgufTensor]:
    """Plans all tensors in file order, under gguf-py's names. Matrices get `precision`. Norms and biases stay fp32."""
    pieces, names = shape.pieces(), get_tensor_name_map(arch, len(shape.layers))
    tensors = []
    for prefix, spec in shape.tensors():
        source = prefix + spec.name
        for part in _parts(prefix, spec, config, architecture.in_turn):
            part_name = _on_disk(source, pieces) if part.name == source else part.name
            name = names.get_name(part_name, try_suffixes=(".weight", ".bias"))
            if name is None:
                arch_name = MODEL_ARCH_NAMES[arch]
                raise UserError(
                    f"{where}: llama.cpp's {arch_name} has no place for {part_name}; {FORMATS_LEFT}"
                )
            part_shape = part.shape[1:] if SHARED_GATE in name else part.shape  # a vector there
            part_shape = (
                (part.shape[0], *part.shape[2:])
                if any(x in name for x in CONVOLUTIONS)
                else part_shape
            )
            module = part_name.rpartition(".")[0]
            inner = module.split(".", 3)[-1] if module.startswith("model.layers.") else module
            steps = tuple(_steps(spec, inner, architecture, config, shape))
            tensors.append(
                GgufTensor(
                    source, name, part_shape, _type(name, part_shape, precision), part, steps
                )
            )
    # the head has that scale, untied from the embedding
    if getattr(config, "scale_decoder_outputs", False):
        named = {tensor.name: tensor for tensor in tensors}
        scale = partial(shift, offset=0.0, factor=shape.hidden_size**-0.5)
        head = replace(named.get(OUTPUT, named[EMBEDDING]), name=OUTPUT, steps=(scale,))
        tensors = list((named | {OUTPUT: head}).values())
    return tensors


def read_tensor(pretrained: PretrainedModel, tensor: GgufTensor) -> Array:
    """Reads a tensor in the layout of the GGUF file. Q8_0 gives bytes."""
    read = partial(pretrained.weights.read_flat, tensor.source, dtype=torch.float32)
    values: Array = tensor.part.read(read).view(tensor.shape).numpy()
    for step in tensor.steps:
        values = step(values)
    if tensor.type is GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        where = f"{pretrained.weights.files[tensor.source]}: {tensor.source}"
        raise UserError(f"{where} has values beyond 65504, the limit of f16; {FORMATS_LEFT}")
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
    split = rows[start:].reshape(keys, each, -1, *rows.shape[1:])
    tiled = np.concatenate([rows[:start], split.swapaxes(0, 1).reshape(-1, *rows.shape[1:])])
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
        yield partial(
            tile, keys=spec.spans[0].groups, each=each, start=start, columns=spec.axis == 1
        )
    if spec.name.endswith(A_LOG):  # llama.cpp has -exp(value)
        yield lambda values: -np.exp(values)
    offset = architecture.norm_offset if module.endswith("norm") and module != GATED_NORM else 0.0
    factor = 1.0
    if module == architecture.scaled:  # turns llama.cpp's attention scale into transformers'
        is_odd, of_heads = (
            len(shape.layers) == architecture.odd_depth,
            shape.hidden_size // config.num_attention_heads,
        )
        factor = ((of_heads if is_odd else shape.head_dim) / config.query_pre_attn_scalar) ** 0.5
    if (offset, factor) != (0.0, 1.0):
        yield partial(shift, offset=offset, factor=factor)


def _parts(prefix: str, spec: TensorSpec, config: Any, in_turn: bool) -> Iterable[SourcePart]:
    """Returns the parts of a parameter that are tensors in llama.cpp. Most parameters are one part."""
    linear, _, last = spec.name.rpartition(".")
    if linear == "self_attn.kv_b_proj":
        return _latent_parts(prefix, spec, config.qk_nope_head_dim)
    if linear in PARTS:
        return _fused_parts([f"{prefix}{part}.{last}" for part in PARTS[linear]], spec)
    if spec.stack or spec.name.endswith(BIAS):
        return _expert_parts(prefix, spec, in_turn)
    return [SourcePart(prefix + spec.name, spec.shape, spec.shape)]


def _latent_parts(prefix: str, spec: TensorSpec, keys: int) -> Iterator[SourcePart]:
    """Splits the projection of latent keys and values, of which `keys` rows of each head are keys."""
    heads, both, rank = spec.spans[0].groups, spec.spans[0].width, spec.shape[1]
    name, one = f"{prefix}self_attn.{{}}_b_proj.weight".format, (both, rank)
    yield SourcePart(name("k"), (heads, rank, keys), one, (slice(0, keys),), heads, transposed=True)
    yield SourcePart(name("v"), (heads, both - keys, rank), one, (slice(keys, both),), heads)


def _fused_parts(names: list[str], spec: TensorSpec) -> Iterator[SourcePart]:
    start = 0
    for name, run in zip(names, spec.spans, strict=True):
        yield SourcePart(
            name, (run.size, *spec.shape[1:]), spec.shape, (slice(start, start + run.size),)
        )
        start += run.size


def _expert_parts(prefix: str, spec: TensorSpec, in_turn: bool) -> Iterator[SourcePart]:
    """Splits a stack of experts, or its biases. If `in_turn`, outputs of gate and up alternate."""
    experts, size, transposed = (
        spec.spans[0].groups,
        spec.shape,
        bool(spec.stack and spec.stack.transposed),
    )
    kind, one = ("weight", (size[0] // experts, size[1])) if spec.stack else ("bias", size[1:])
    outputs, *inputs = reversed(one) if transposed else one
    parts = EXPERT_PARTS[spec.linear.removesuffix(BIAS).rpartition(".")[2]]
    each = outputs // len(parts)
    for i, part in enumerate(parts):
        take = slice(i, None, len(parts)) if in_turn else slice(i * each, (i + 1) * each)
        name, along = f"{prefix}{part}.{kind}", (slice(None), take) if transposed else (take,)
        yield SourcePart(name, (experts, each, *inputs), one, along, experts, transposed)


def _on_disk(source: str, pieces: Mapping[str, Pieces]) -> str:
    """Returns the name in weight files, as gguf-py knows it: sinks are a weight, corrections and steps are biases."""
    name = pieces[source].names[0] if source in pieces else source
    name = name.replace(CORRECTION, CORRECTION.replace("_bias", ".bias")).replace(
        "dt_bias", "dt_proj.bias"
    )
    name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    return name if name.endswith((".weight", ".bias", A_LOG)) else f"{name}.weight"


def _type(name: str, size: tuple[int, ...], precision: Precision) -> GGMLQuantizationType:
    """Returns the type that stores a tensor: fp32 for vectors, routers, convolutions and small biases."""
    if (
        len(size) == 1
        or any(x in name for x in (ROUTER, RELATIVE_BIAS, *CONVOLUTIONS))
        or name.endswith(".bias")
    ):
        return GGMLQuantizationType.F32
    matrix_type = GGMLQuantizationType[precision.upper()]
    block, _ = GGML_QUANT_SIZES[matrix_type]
    return matrix_type if size[-1] % block == 0 else GGMLQuantizationType.F16
