"""The files of a model's folder: safetensors with their headers and index, tokenizer, processors and documents."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.frozen import DTYPES, READ_CHUNK, Pieces
from loraprune_ds.model.groups import Shape
from loraprune_ds.units import format_bytes

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILES = "model-*-of-*.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SAVE_AGAIN = (
    "AutoModelForCausalLM.from_pretrained(folder, dtype='auto').save_pretrained(other_folder), "
    "for a T5 AutoModelForSeq2SeqLM"
)
# Digests in checkpoints depend on these two.
SAMPLE = 16 << 10  # bytes
PER_SAMPLE = 16 << 20  # bytes of a tensor
SAMPLERS = 16  # threads. On a network file system each sample may take a millisecond
Header = dict[str, tuple[Shape, str]]  # tensor name -> (shape, dtype)
Headers = dict[str, tuple[Shape, str, Path]]  # of all files: tensor name -> (shape, dtype, file)
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    TOKENIZER_CONFIG,
    "chat_template.*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
DOCUMENTS = ("README.md", *(f"{name}{end}" for name in LEGAL for end in ("", ".md", ".txt")))
AUTO_MAP = "auto_map"  # JSON key that names classes in the folder's code


def read_headers(folder: Path) -> Headers:
    """Reads the headers of all weight files, and checks the length of each file."""
    names = weight_file_names(folder)
    headers: Headers = {}
    for path in (folder / name for name in names):
        require(path.is_file(), f"{path} is missing; {INDEX_FILE} names it")
        require(os.access(path, os.R_OK), f"{path} cannot be read: permission denied")
        for name, (shape, dtype) in read_header(path).items():
            if name in headers:
                raise UserError(f"{path}: {name} is also in {headers[name][2].name}")
            headers[name] = shape, dtype, path
    for path in sorted(folder.glob(WEIGHT_FILES)):
        if path.name not in names:
            raise UserError(f"{path} is not named by {INDEX_FILE}; remove it or repair the index")
    return headers


def read_header(path: Path) -> Header:
    """Reads shape and dtype of each tensor in a safetensors file, and checks its length."""
    header: Header = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                view = file.get_slice(name)
                header[name] = tuple(view.get_shape()), view.get_dtype()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return header


def read_samples(path: Path) -> Iterator[bytes]:
    """Yields the header of a safetensors file, then 16 KiB of every 16 MiB of each tensor, at fixed places."""
    read_header(path)  # checks the file
    with path.open("rb") as file, ThreadPoolExecutor(SAMPLERS) as pool:
        header = file.read(int.from_bytes(file.read(8), "little"))
        yield header
        begin = file.tell()
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        samples: list[tuple[int, int]] = []
        for first, last in sorted(entry["data_offsets"] for entry in entries.values()):
            samples += _samples(begin + first, begin + last)
        yield from pool.map(lambda sample: os.pread(file.fileno(), *sample), samples)


def _samples(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Splits the bytes [first, last) into equal parts. Yields size and start of the middle of each."""
    count = max(1, -(-(last - first) // PER_SAMPLE))
    bounds = [first + (last - first) * i // count for i in range(count + 1)]
    for start, end in pairwise(bounds):
        size = min(SAMPLE, end - start)
        yield size, start + (end - start - size) // 2


def have_equal_values(name: str, other: str, headers: Headers) -> bool:
    """Returns True if two tensors have the same values. Only then embedding and head are tied, as in transformers."""
    shape, _, file = headers[name]
    other_shape, _, other_file = headers[other]
    if shape != other_shape:
        return False
    rows = max(1, READ_CHUNK // math.prod(shape[1:]))
    with safe_open(file, framework="pt") as first, safe_open(other_file, framework="pt") as second:
        chunks = first.get_tensor(name).split(rows)
        other_chunks = second.get_tensor(other).split(rows)
        pairs = zip(chunks, other_chunks, strict=True)
        return all(torch.equal(a.float(), b.float()) for a, b in pairs)


def weight_file_names(folder: Path) -> list[str]:
    """Lists the weight files of a folder, from its index if there is one, which may name only files next to it."""
    index = folder / INDEX_FILE
    if not index.is_file():
        names = {path.name for path in folder.glob("*.safetensors")} - {ADAPTER_WEIGHTS}
        require(
            names,
            f"{folder} has no safetensors files; save a model in .bin files again by {SAVE_AGAIN}",
        )
        return sorted(names)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if Path(str(name)).name != str(name):
            raise UserError(
                f"{index}: {tensor} is in {name}; only files next to the index are read"
            )
    return sorted(set(map(str, weight_map.values())))


def write_weight_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, path, metadata={"format": "pt"})


def check_room(folder: Path, numel: int, dtype: Dtype) -> None:
    """Raises UserError unless the disk of a folder, which may be new, has room for a model of `numel` parameters."""
    needed = numel * DTYPES[dtype].itemsize
    disk = next(shutil.disk_usage(path) for path in (folder, *folder.parents) if path.exists())
    free = format_bytes(disk.free)
    require(
        needed <= disk.free or not disk.total,  # some file systems do not say
        f"{folder} needs {format_bytes(needed)} for the merged model, but {free} are free; "
        "make room, or take a folder on another disk",
    )


def copy_tensors(files: Mapping[str, Path], path: Path) -> None:
    """Copies tensors bit by bit from other weight files into a new one."""
    tensors: dict[str, Tensor] = {}
    for source in dict.fromkeys(files.values()):
        with safe_open(source, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name, of in files.items() if of == source}
    write_weight_file(path, tensors)


def as_on_disk(
    tensors: Mapping[str, Tensor],
    pieces: Mapping[str, Pieces],
    name_on_disk: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Splits or reshapes stacks of experts into the tensors of a weight file (`ModelShape.pieces`)."""
    on_disk: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names, shape, transposed = pieces.get(name, Pieces((name,), tensor.shape))
        parts = tensor.reshape(len(names), *shape)
        if transposed:
            parts = parts.mT
        on_disk |= zip(map(name_on_disk, names), parts, strict=True)
    return on_disk


def write_index(folder: Path, names: Sequence[str]) -> None:
    """Writes model.safetensors.index.json of these weight files, by their headers."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in (folder / name for name in names):
        tensors = read_header(path)
        assert not weight_map.keys() & tensors.keys(), "a tensor is in two files"
        weight_map |= dict.fromkeys(tensors, path.name)
        with path.open("rb") as file:  # it begins with the length of its header
            header_size = int.from_bytes(file.read(8), "little")
        total_size += path.stat().st_size - 8 - header_size
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def named_files(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yields the files with these names. Links count, because the hub's cache has only links."""
    for pattern in patterns:
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def copy_named(source: Path, out: Path, patterns: Sequence[str]) -> None:
    for path in named_files(source, patterns):
        shutil.copyfile(path, out / path.name)


def drop_auto_maps(folder: Path) -> None:
    """Removes `auto_map` from the settings of tokenizer and processors, because their code is not copied."""
    for path in named_files(folder, (TOKENIZER_CONFIG, *PROCESSOR_FILES)):
        settings = read_json(path)
        if settings.pop(AUTO_MAP, None) is not None:
            write_json(path, settings)
