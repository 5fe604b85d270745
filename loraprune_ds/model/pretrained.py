"""A pretrained model on disk, checked by its headers and read in parts, so that no rank holds a whole model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loraprune_ds.config import Frozen, PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.frozen import BLOCK, READ_CHUNK, SCALE, WEIGHT, Int8, Matrix, NotFinite, StoredTensor
from loraprune_ds.model.read_shape import check_family, shape_from_config, text_config, text_tensors
from loraprune_ds.model.shapes import LayerKeep, ModelShape, Pieces
from loraprune_ds.model.storage import MODEL_DTYPE, FrozenStorage, Slice
from loraprune_ds.model.weight_files import Headers, read_headers

HEAD = "lm_head.weight"
IGNORED = (".rotary_emb.inv_freq", HEAD)  # recomputed, and a tied head
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names
MXFP4 = "_blocks"  # the end of the names of 4-bit experts
DEQUANTISE = (
    "dequantise it first: AutoModelForCausalLM.from_pretrained(folder, dtype='bfloat16', "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(other_folder)"
)
# In the config.json of a checkpoint whose frozen weights are stored as int8 with scales.
STORED_INT8 = {"quantization_config": {"quant_method": "loraprune_ds_int8", "block": BLOCK}}


@dataclass(frozen=True)
class PretrainedModel:
    """A model of a family in family.py.

    Attributes:
        config: config.json, or its text part, or the config of the model that `slices` leave.
        shape: the sizes it declares, checked against the tensors on disk.
        files: tensor name -> weight file.
        names_on_disk: tensor name -> its name in the file, where that differs (`read_shape.py`).
        slices: tensor name -> the part of it that belongs to the model, after `cut_to`.
        pieces: name of a stack of experts -> the tensors on disk that form it, which are the keys of `files`.
        storage: how the ranks store the weights. The files may store them in the model's dtype.
    """

    folder: Path
    config: dict[str, Any]
    shape: ModelShape
    files: dict[str, Path]
    names_on_disk: Mapping[str, str] = field(default_factory=dict[str, str])
    slices: Mapping[str, Slice] = field(default_factory=dict)
    pieces: Mapping[str, Pieces] = field(default_factory=dict)
    storage: FrozenStorage = MODEL_DTYPE

    def read_flat(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns the elements [start, end) of the row-major flat view of a tensor: (end - start,) in `dtype`.

        Only the rows that contain them, and rows between two kept ones, are read from disk.
        """
        if name in self.pieces:
            return self._read_pieces(self.pieces[name], start, end, dtype)
        shard = torch.empty(end - start, dtype=dtype)
        with safe_open(self.files[name], framework="pt") as file:
            view = file.get_slice(self.names_on_disk.get(name, name))
            *on_disk, width = view.get_shape() if len(view.get_shape()) > 1 else (*view.get_shape(), 1)
            kept = self.slices.get(name, Slice(0, torch.arange(math.prod(on_disk))))
            columns = len(kept.keep) if kept.axis == 1 else width
            first, last = start // columns, -(-end // columns)
            rows = kept.keep[first:last] if kept.axis == 0 else torch.arange(first, last)
            for at, block in _blocks(rows, max(1, READ_CHUNK // width)):
                values = _rows(view, int(block[0]), int(block[-1]) + 1)
                if len(block) < len(values):
                    values = values[block - block[0]]
                values = (values[:, kept.keep] if kept.axis == 1 else values).reshape(-1)
                origin = (first + at) * columns
                low, high = max(start, origin), min(end, origin + len(values))
                shard[low - start : high - start] = values[low - origin : high - origin].to(dtype)
        return shard

    def _read_pieces(self, pieces: Pieces, start: int, end: int, dtype: torch.dtype) -> Tensor:
        numel, parts = math.prod(pieces.shape), [torch.empty(0, dtype=dtype)]
        for i in range(start // numel, -(-end // numel) if end > start else 0):
            low, high = max(start - i * numel, 0), min(end - i * numel, numel)
            parts.append(self.read_flat(pieces.names[i], low, high, dtype))
        return torch.cat(parts)

    def read_stored(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """As `read_flat`, for a tensor of `FrozenStorage.stored`. int8 weights and fp32 parameters ignore `dtype`."""
        path, _, tensor = name.rpartition(".")
        weight = f"{path}.{WEIGHT}"
        if weight not in self._int8 or tensor not in Int8.tensors:
            return self.read_flat(name, start, end, torch.float32 if name in self._keep_fp32 else dtype)
        if f"{path}.{SCALE}" in self.files:
            return self.read_flat(name, start, end, torch.int8 if tensor == WEIGHT else dtype)
        stored_as, shape = self._int8[weight]
        try:
            return stored_as.read(
                tensor, shape, start, end, partial(self.read_flat, weight, dtype=torch.float32), dtype
            )
        except NotFinite:
            names, size = self.pieces.get(weight, Pieces((weight,), shape))
            parts = ((x, self.read_flat(x, 0, math.prod(size), torch.float32)) for x in names)
            bad = next(x for x, values in parts if not torch.isfinite(values).all())
            raise UserError(f"{self.files[bad]}: {bad} has an inf or NaN, which int8 cannot hold") from None

    def read_full(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one of `ModelShape.parameters`, dequantised."""
        shape = self.shape.parameters()[name]
        if name not in self._int8:
            return self.read_stored(name, 0, math.prod(shape), dtype).view(shape)
        stored_as, matrix = self._int8[name]
        tensors = dict[str, Tensor]()
        for tensor, (size, _) in stored_as.stored(matrix, 1).items():
            flat = self.read_stored(name.removesuffix(WEIGHT) + tensor, 0, math.prod(size), dtype)
            tensors[tensor] = flat.view(size)
        return stored_as.join(tensors)

    @cached_property
    def _keep_fp32(self) -> frozenset[str]:
        return self.shape.keep_fp32

    @cached_property
    def _int8(self) -> dict[str, tuple[Int8, Matrix]]:
        shape = self.shape
        return {
            f"model.layers.{i}.{linear.name}.{WEIGHT}": (stored_as, shape.linear_shape(i, linear))
            for i, linear in shape.linear_ids()
            if isinstance(stored_as := self.storage.format_of(shape, linear), Int8)
        }


def _rows(view: Any, start: int, end: int) -> Tensor:
    """Reads some rows of a tensor on disk. Rows of a tensor of three dimensions are counted across its matrices."""
    *matrices, height, _ = (1, *view.get_shape())
    if len(matrices) < 2:
        return view[start:end]
    blocks = range(start // height, -(-end // height))
    return torch.cat([view[i, max(start - i * height, 0) : min(end - i * height, height)] for i in blocks])


def _blocks(rows: Tensor, span: int) -> Iterator[tuple[int, Tensor]]:
    """Splits ascending rows into blocks that span less than `span`, each with the position of its first row."""
    at = 0
    while at < len(rows):
        end = int(torch.searchsorted(rows, rows[at] + span))
        yield at, rows[at:end]
        at = end


def open_pretrained(folder: Path, *, int8: bool = False) -> PretrainedModel:
    """Reads config.json and the headers of all weight files. Takes the text part of a multimodal model.

    Args:
        int8: accept frozen weights that a checkpoint stores as int8 with scales.

    Raises:
        UserError: the model is not supported. A file is missing, surplus or damaged. A tensor is missing, surplus or
            quantized, or its shape contradicts config.json.
    """
    where = str(folder)
    given = read_json(folder / "config.json")
    config = text_config(given, where)
    shape, storage = shape_from_config(config, where), FrozenStorage(int8 and given.items() >= STORED_INT8.items())
    headers = read_headers(folder)
    on_disk = text_tensors(headers, where) if config is not given else {name: name for name in headers}
    pieces = shape.pieces()
    renamed = {stack.names[0]: name for name, stack in pieces.items() if len(stack.names) == 1}
    on_disk = {renamed.get(name, name): in_file for name, in_file in on_disk.items()}
    headers = {name: headers[in_file] for name, in_file in on_disk.items()}
    if config is not given and HEAD in headers and shape.tie_word_embeddings:
        config = config | {"tie_word_embeddings": False}  # as transformers decides
        shape = shape_from_config(config, where)
    expected = storage.stored(shape, 2)
    for name, (names, size) in pieces.items():
        expected |= dict.fromkeys([renamed.get(each, each) for each in names], expected.pop(name)._replace(shape=size))
    extra = config.get("num_nextn_predict_layers") or 0  # layers after the last one, which the model does not use
    beyond = tuple(f"model.layers.{len(shape.layers) + i}." for i in range(extra))
    _check_tensors(folder, {name: x for name, x in headers.items() if not name.startswith(beyond)}, expected)
    files = {name: headers[name][2] for name in expected}
    if storage.int8:  # transformers would not know the method
        config = {key: value for key, value in config.items() if key not in STORED_INT8}
    pieces = {name: stack for name, stack in pieces.items() if len(stack.names) > 1}
    return PretrainedModel(folder, config, shape, files, on_disk, pieces=pieces, storage=storage)


def _check_tensors(folder: Path, headers: Headers, expected: Mapping[str, StoredTensor]) -> None:
    if packed := next((name for name in headers if name.endswith(MXFP4)), None):
        raise UserError(f"{headers[packed][2]}: {packed} is stored as MXFP4, which cannot be pruned; {DEQUANTISE}")
    for name, stored in expected.items():
        if name not in headers:
            raise UserError(f"{folder}: tensor {name} is missing")
        found, dtype, path = headers[name]
        if found != stored.shape:
            raise UserError(f"{path}: {name} has shape {list(found)}; config.json says {list(stored.shape)}")
        if dtype not in (FLOAT_TYPES if stored.element_size > 1 else ("I8",)):
            raise UserError(f"{path}: {name} is stored as {dtype}; quantized weights cannot be pruned")
    for name, (_, _, path) in headers.items():
        if name not in expected and not name.endswith(IGNORED):
            raise UserError(f"{path}: {name} has no place in the model that config.json describes")


def open_for_pruning(
    folder: Path, prune: PruneConfig, *, frozen: Frozen | None = None, packing: bool = False
) -> PretrainedModel:
    """Opens the model of a run as `open_pretrained`, and checks that it has everything that the run needs."""
    storage = FrozenStorage(int8=frozen == "int8")
    pretrained = open_pretrained(folder, int8=storage.int8)
    check_family(pretrained.shape.family, pretrained.config, str(folder), prune, packing=packing)
    return replace(pretrained, storage=storage)


def cut_to(pretrained: PretrainedModel, keep: Sequence[LayerKeep], dtype: str) -> PretrainedModel:
    """Returns the model that keeps these groups. Its weights are slices of the files on disk.

    Args:
        keep: per layer, the groups of the model on disk that stay.
        dtype: of the weights, as config.json names it.
    """
    dense = pretrained.shape
    left = dense.after(keep)
    if left.layers == dense.layers:
        return pretrained
    slices = {
        f"model.layers.{i}.{name}": kept
        for i, layer_keep in enumerate(keep)
        for name, kept, _ in pretrained.storage.layer_cuts(dense, i, layer_keep)
    }
    pieces = {
        name: stack.keep_rows(slices.pop(name).keep) if name in slices else stack
        for name, stack in pretrained.pieces.items()
    }
    config = export_config(pretrained.config, left, dtype).config
    return replace(pretrained, config=config, shape=left, slices=slices, pieces=pieces)
