"""A pretrained model on disk, checked by its headers and read in parts. So nobody holds a whole model."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.read_shape import shape_from_config, with_biases
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.text_part import text_config, text_tensors

WEIGHT_FILES = "model-*-of-*.safetensors"
READ_CHUNK = 1 << 24  # elements converted at a time, so that reading needs little beyond the shard itself
HEAD = "lm_head.weight"
IGNORED = (".rotary_emb.inv_freq", HEAD)  # the first is computed anew. A tied head is the embedding
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")  # safetensors' names. An 8-bit weight means nothing without its scales


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) of a tensor on disk that are read.

    Attributes:
        keep: (kept,) int64, ascending.
    """

    axis: int
    keep: Tensor


@dataclass(frozen=True)
class PretrainedModel:
    """Holds a model of a family in family.py.

    Attributes:
        folder: has config.json and the tokenizer.
        config: config.json as it is, or its text part, or as it would be of the model that `slices` leave.
        shape: the sizes it declares, checked against the tensors on disk.
        files: tensor name -> weight file.
        stored: tensor name -> its name in the file, if it has another there (`text_part.py`).
        absent: names of tensors that no file holds and that are zero (`open_for_pruning`).
        slices: tensor name -> the part of it that belongs to the model, if not all (`cut_to`).
    """

    folder: Path
    config: dict[str, Any]
    shape: ModelShape
    files: dict[str, Path]
    stored: Mapping[str, str] = field(default_factory=dict[str, str])
    absent: frozenset[str] = frozenset()
    slices: Mapping[str, Slice] = field(default_factory=dict)

    def read_flat(self, name: str, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Returns the elements [start, end) of the row-major flat view of a tensor: (end - start,) in `dtype`.

        Only the rows that contain them are read from disk. Rows that lie between two kept ones are read, too.
        """
        if name in self.absent:
            return torch.zeros(end - start, dtype=dtype)
        shard = torch.empty(end - start, dtype=dtype)
        with safe_open(self.files[name], framework="pt") as file:
            view = file.get_slice(self.stored.get(name, name))
            on_disk = view.get_shape()
            kept = self.slices.get(name, Slice(0, torch.arange(on_disk[0])))
            width = on_disk[1] if len(on_disk) == 2 else 1
            columns = len(kept.keep) if kept.axis == 1 else width
            first, last = start // columns, -(-end // columns)
            rows = kept.keep[first:last] if kept.axis == 0 else torch.arange(first, last)
            for at, block in _blocks(rows, max(1, READ_CHUNK // width)):
                values = view[int(block[0]) : int(block[-1]) + 1]
                if len(block) < len(values):
                    values = values[block - block[0]]
                values = (values[:, kept.keep] if kept.axis == 1 else values).reshape(-1)
                origin = (first + at) * columns
                low, high = max(start, origin), min(end, origin + len(values))
                shard[low - start : high - start] = values[low - origin : high - origin].to(dtype)
        return shard


def _blocks(rows: Tensor, span: int) -> Iterator[tuple[int, Tensor]]:
    """Splits ascending rows into blocks that span less than `span`. Yields each with the position of its first row."""
    at = 0
    while at < len(rows):
        end = int(torch.searchsorted(rows, rows[at] + span))
        yield at, rows[at:end]
        at = end


def open_pretrained(folder: Path) -> PretrainedModel:
    """Reads config.json and the headers of all weight files, but no weight. Of a multimodal model only the text part.

    Raises:
        UserError: the model is not supported. A file is missing, surplus or damaged. A tensor is missing, surplus or
            quantized, or its shape contradicts config.json.
    """
    where = str(folder)
    given = read_json(folder / "config.json")
    config = text_config(given, where)
    shape = shape_from_config(config, where)
    headers = _read_headers(folder)
    stored = text_tensors(headers, where) if config is not given else {name: name for name in headers}
    headers = {name: headers[in_file] for name, in_file in stored.items()}
    if config is not given and HEAD in headers and shape.tie_word_embeddings:
        config = config | {"tie_word_embeddings": False}  # as transformers, which then does not tie the two
        shape = shape_from_config(config, where)
    files, shapes = {}, shape.parameters()
    for name, expected in shapes.items():
        if name not in headers:
            raise UserError(f"{folder}: tensor {name} is missing")
        found, dtype, files[name] = headers[name]
        if found != expected:
            raise UserError(f"{files[name]}: {name} has shape {list(found)}; config.json says {list(expected)}")
        if dtype not in FLOAT_TYPES:
            raise UserError(f"{files[name]}: {name} is stored as {dtype}; quantized weights cannot be pruned")
    for name, (_, _, path) in headers.items():
        if name not in shapes and not name.endswith(IGNORED):
            raise UserError(f"{path}: {name} has no place in the model that config.json describes")
    return PretrainedModel(folder, config, shape, files, stored)


def open_for_pruning(folder: Path, config: PruneConfig) -> PretrainedModel:
    """Opens the model of a run as `open_pretrained`. Adds biases if they are to make up for cuts.

    Raises:
        UserError: as `open_pretrained`, or its linears cannot have biases.
    """
    pretrained = open_pretrained(folder)
    return _with_biases(pretrained) if config.compensate == "bias" else pretrained


def _with_biases(pretrained: PretrainedModel) -> PretrainedModel:
    """Adds biases to all linears of the decoder layers. Those that the model lacks are zero."""
    config, shape = with_biases(pretrained.config, str(pretrained.folder))
    absent = frozenset(name for name in shape.parameters() if name not in pretrained.files)
    return replace(pretrained, config=config, shape=shape, absent=absent)


def cut_to(pretrained: PretrainedModel, keep: Sequence[LayerKeep], dtype: str) -> PretrainedModel:
    """Returns the model that keeps these groups, as if it had been exported and opened.

    Its weights are slices of the files on disk. They are read from there and not stored again.

    Args:
        keep: per layer, the groups of the model on disk that stay.
        dtype: of the weights, as config.json would name it.
    """
    dense = pretrained.shape
    left = dense.after(keep)
    if left.layers == dense.layers:
        return pretrained
    config = export_config(pretrained.config, left, dtype).config
    slices = {
        f"model.layers.{i}.{name}": Slice(axis, kept)
        for i, layer_keep in enumerate(keep)
        for name, axis, kept in dense.layer_cuts(i, layer_keep)
    }
    return replace(pretrained, config=config, shape=shape_from_config(config, str(pretrained.folder)), slices=slices)


def _read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str, Path]]:
    """Returns tensor name -> (shape, dtype, file). Opening a file checks that its length matches its header."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    else:
        names = [path.name for path in sorted(folder.glob("*.safetensors")) if path.name != "adapter_model.safetensors"]
    if not names:
        raise UserError(f"{folder} has no safetensors files")
    headers: dict[str, tuple[tuple[int, ...], str, Path]] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise UserError(f"{path} is missing; {index.name} names it")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path} cannot be read: permission denied")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    if name in headers:
                        raise UserError(f"{path}: {name} is in {headers[name][2].name}, too")
                    headers[name] = tuple(view.get_shape()), view.get_dtype(), path
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    check_no_surplus(folder, WEIGHT_FILES, names, index.name)
    return headers


def check_no_surplus(folder: Path, pattern: str, names: Collection[str], index: str) -> None:
    """Checks that the index of a folder's weight files names all of them.

    Raises:
        UserError: a file that looks like a weight file is none of `names`.
    """
    if surplus := sorted(path for path in folder.glob(pattern) if path.name not in names):
        raise UserError(f"{surplus[0]} is one weight file too many; {index} does not name it")
