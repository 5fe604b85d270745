"""The weights of a model on disk, checked by the headers of their files, and read in parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from loraprune_ds.errors import UserError
from loraprune_ds.model.codecs import NotFinite
from loraprune_ds.model.frozen import READ_CHUNK, SCALE, WEIGHT, Blocks, Pieces, Slice, fill
from loraprune_ds.model.groups import LayerKeep, Shape, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.weight_files import Headers

HEAD = "lm_head.weight"
# Recomputed or tied tensors, and an unused tensor in early T5 files.
IGNORED = (
    ".rotary_emb.inv_freq",
    HEAD,
    "coder.embed_tokens.weight",
    ".EncDecAttention.relative_attention_bias.weight",
)
FUSED_EXPERTS = ".experts.gate_up_proj"  # end of the name if all experts of a layer are one tensor
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
MXFP4 = "_blocks"  # end of the names of 4-bit experts
DEQUANTISE = (
    "dequantise it first: AutoModelForCausalLM.from_pretrained(folder, dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(other_folder)"
)


@dataclass(frozen=True)
class ModelWeights:
    """Reads the weights of a model, or of the smaller model after `cut`.

    Attributes:
        files: tensor name -> weight file.
        names_on_disk: tensor name -> its name in the file.
        pieces: name of a stack of experts -> its tensors on disk, which are the keys of `files`.
        slices: tensor name -> the part that belongs to the model after a cut.
        formats: name of a linear's weight -> how ranks store it. Files may have it in the model's dtype.
    """

    shape: ModelShape
    files: Mapping[str, Path]
    names_on_disk: Mapping[str, str]
    pieces: Mapping[str, Pieces]
    slices: Mapping[str, Slice] = field(default_factory=dict)
    transposed: bool = False  # the files have the matrix of each expert transposed
    formats: Mapping[str, Blocks] = field(default_factory=dict)

    def cut(self, keep: Sequence[LayerKeep]) -> "ModelWeights":
        """Returns the weights that these groups of each layer leave."""
        smaller = self.shape.after(keep)
        if smaller.layers == self.shape.layers:
            return self
        slices: dict[str, Slice] = {}
        for i, layer in enumerate(self.shape.layers):
            prefix = self.shape.prefix(i)
            for tensor, part in layer.cuts(keep[i]):
                slices[prefix + tensor.name] = part
        pieces = dict(self.pieces)
        for name in self.pieces.keys() & slices.keys():
            pieces[name] = pieces[name].keep_rows(slices.pop(name).keep)
        return replace(self, shape=smaller, slices=slices, pieces=pieces)

    def overlaid(self, others: "ModelWeights") -> "ModelWeights":
        """Returns these weights, with the tensors of `others` in place of their own. `others` has them whole."""
        return replace(
            self,
            files={**self.files, **others.files},
            names_on_disk={**self.names_on_disk, **others.names_on_disk},
            slices={name: part for name, part in self.slices.items() if name not in others.files},
        )

    def read_flat(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns the elements [start, end) of the row-major flat view of a tensor: (end - start,) in `dtype`.

        The file is mapped, so only these elements are read from disk.
        """
        if name in self.pieces:
            return self._read_pieces(self.pieces[name], start, end, dtype)
        with safe_open(self.files[name], framework="pt") as file:
            stored = file.get_tensor(self.names_on_disk[name])
            if self.transposed and stored.ndim == 3:
                stored = stored.mT
            elif name not in self.slices:
                return stored.view(-1)[start:end].to(dtype, copy=True)
            if stored.ndim == 1:  # a row for each element
                stored = stored.unsqueeze(1)
            *heights, _ = stored.shape
            part = self.slices.get(name, Slice(0, torch.arange(math.prod(heights))))
            return _read_part(stored, part, start, end, dtype)

    def _read_pieces(self, pieces: Pieces, start: int, end: int, dtype: torch.dtype) -> Tensor:
        numel = math.prod(pieces.shape)
        first = start // numel
        last = -(-end // numel)
        parts = [torch.empty(0, dtype=dtype)]
        for i, name in enumerate(pieces.names[first:last], start=first):
            low = max(start - i * numel, 0)
            high = min(end - i * numel, numel)
            parts.append(self.read_flat(name, low, high, dtype))
        return torch.cat(parts)

    def read_stored(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Reads a tensor of `Storage.stored` like `read_flat`. Codes, scales and fp32 tensors ignore `dtype`."""
        path, _, tensor = name.rpartition(".")
        weight = f"{path}.{WEIGHT}"
        stored_as = self.formats.get(weight)
        if stored_as is None or tensor not in stored_as.tensors:
            keeps_fp32 = name in self._tensors and self._tensors[name].keep_fp32
            return self.read_flat(name, start, end, torch.float32 if keeps_fp32 else dtype)
        matrix = self._tensors[weight].matrix
        if f"{path}.{SCALE}" in self.files:
            return self.read_flat(name, start, end, stored_as.stored(matrix)[tensor].dtype)
        try:
            return stored_as.read(tensor, matrix, start, end, partial(self._read_rows, weight))
        except NotFinite:
            pieces = self.pieces.get(weight, Pieces((weight,), matrix))
            for piece in pieces.names:
                values = self.read_flat(piece, 0, math.prod(pieces.shape), torch.float32)
                if not torch.isfinite(values).all():
                    raise UserError(
                        f"{self.files[piece]}: {piece} has an inf or NaN, which {stored_as.codec.name} cannot hold"
                    ) from None
            raise

    def _read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Returns the rows [first, last) of a weight as they are stored, in fp32."""
        rows, columns = self._tensors[name].matrix
        if not self.formats[name].transposed:
            flat = self.read_flat(name, first * columns, last * columns, torch.float32)
            return flat.view(-1, columns)
        kept = self.slices.get(name, Slice(1, torch.arange(columns))).keep
        narrow = replace(self, slices={name: Slice(1, kept[first:last])})
        flat = narrow.read_flat(name, 0, rows * (last - first), torch.float32)
        return flat.view(rows, -1).t().contiguous()

    def read_full(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one of `ModelShape.parameters`, dequantised."""
        tensor = self._tensors[name]
        stored_as = self.formats.get(name)
        if stored_as is None:
            return self.read_stored(name, 0, tensor.numel, dtype).view(tensor.shape)
        prefix = name.removesuffix(WEIGHT)
        parts: list[Tensor] = []
        for part, (shape, _) in stored_as.stored(tensor.matrix).items():
            values = self.read_stored(f"{prefix}{part}", 0, math.prod(shape), dtype)
            parts.append(values.view(shape))
        return stored_as.join(parts)

    def spec(self, name: str) -> TensorSpec:
        """Describes one of `ModelShape.parameters`."""
        return self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, TensorSpec]:
        return {prefix + tensor.name: tensor for prefix, tensor in self.shape.tensors()}


def check_weights(
    folder: Path, headers: Headers, names: Mapping[str, str], shape: ModelShape
) -> ModelWeights:
    """Checks the headers of weight files against the shape from config.json.

    Args:
        names: name of a tensor or of a piece of it -> its name in the file.

    Raises:
        UserError: a tensor is missing, surplus or quantized, or has another shape.
    """
    fused = [name for name in names if name.endswith(FUSED_EXPERTS)]
    stacks = shape.pieces(fused=bool(fused))
    # A stack that is one tensor on disk needs no pieces.
    whole = {stack.names[0]: name for name, stack in stacks.items() if len(stack.names) == 1}
    transposed = False
    for name in whole.keys() & fused[:1]:
        transposed = headers[names[name]][0] != stacks[whole[name]].shape
    names_on_disk = {whole.get(name, name): in_file for name, in_file in names.items()}
    found = {name: headers[in_file] for name, in_file in names_on_disk.items()}
    expected = shape.parameters()
    for name, stack in stacks.items():
        size = stack.shape
        if transposed and len(size) == 3:
            size = (size[0], size[2], size[1])
        del expected[name]
        for piece in stack.names:
            expected[whole.get(piece, piece)] = size
    _check_tensors(folder, found, expected)
    return ModelWeights(
        shape,
        files={name: found[name][2] for name in expected},
        names_on_disk=names_on_disk,
        pieces={name: stack for name, stack in stacks.items() if len(stack.names) > 1},
        transposed=transposed,
    )


def _check_tensors(folder: Path, headers: Headers, expected: Mapping[str, Shape]) -> None:
    for name, (_, _, path) in headers.items():
        if name.endswith(MXFP4):
            raise UserError(
                f"{path}: {name} is stored as MXFP4, which cannot be pruned; {DEQUANTISE}"
            )
    for name, size in expected.items():
        if name not in headers:
            raise UserError(f"{folder}: tensor {name} is missing")
        on_disk, dtype, path = headers[name]
        if on_disk != size:
            raise UserError(
                f"{path}: {name} has shape {list(on_disk)}; config.json says {list(size)}"
            )
        if dtype not in FLOAT_TYPES:
            raise UserError(
                f"{path}: {name} is stored as {dtype}; quantized weights cannot be pruned"
            )
    for name, (_, _, path) in headers.items():
        if name not in expected and not name.endswith(IGNORED):
            raise UserError(f"{path}: {name} has no place in the model that config.json describes")


def _read_part(stored: Tensor, part: Slice, start: int, end: int, dtype: torch.dtype) -> Tensor:
    """Reads the elements [start, end) of the flat view of the rows or columns that a cut leaves."""
    if part.axis == 1 and len(part.keep):  # other columns are not copied
        low = int(part.keep[0])
        stored = stored[..., low : int(part.keep[-1]) + 1]
        part = Slice(1, part.keep - low)
    *heights, width = stored.shape
    columns = len(part.keep) if part.axis == 1 else width
    first = start // columns
    last = -(-end // columns)
    rows = torch.arange(first, last)
    if part.axis == 0:
        rows = part.keep[first:last]
    elements = torch.empty(end - start, dtype=dtype)
    step = max(1, READ_CHUNK // width)
    for i, chunk in enumerate(rows.split(step)):
        values = stored[torch.unravel_index(chunk, heights)]
        if part.axis == 1:
            values = values[:, part.keep]
        fill(elements, start, values.reshape(-1), (first + i * step) * columns)
    return elements
