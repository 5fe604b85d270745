"""Converts `.bin` files (torch's pickles) to safetensors. Of these a rank can read its shard alone.

    python -m loraprune_ds.model.convert_bin FOLDER
does that ahead of a run. Otherwise a run does it when it starts, once per node.

A file's tensors are mapped, not read, and written a few at a time. So the process never holds more than twice
WEIGHT_FILE_BYTES or twice the largest tensor. Files that torch wrote before 1.6 cannot be mapped: of those one is held.
The result is in the user's cache under a digest of the source. It is as large as the source.
"""

import hashlib
import logging
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.model.folder_files import PROCESSOR_FILES, TOKENIZER_FILES, copy_named, named_files
from loraprune_ds.model.weight_files import write_index, write_weight_file
from loraprune_ds.model.weight_headers import check_no_surplus, indexed_names
from loraprune_ds.whole import make_once, user_cache

INDEX = "pytorch_model.bin.index.json"
BIN_FILES = "pytorch_model-*-of-*.bin"
FOLDER = "loraprune_ds/converted"
SINGLE = "pytorch_model.bin"
KEPT = ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)
WEIGHT_FILE_BYTES = 1 << 28  # of tensors written to one file, unless one alone is larger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _WeightFile:
    """Names tensors of one `.bin` file that go to one weight file."""

    source: Path
    names: list[str]


def needs_conversion(folder: Path) -> bool:
    """Tells if a folder holds `.bin` files and no safetensors."""
    has_bin = (folder / INDEX).is_file() or (folder / SINGLE).is_file()
    return has_bin and not any(path.name != "adapter_model.safetensors" for path in folder.glob("*.safetensors"))


def converted(folder: Path) -> Path:
    """Returns the folder of the same model as safetensors, made at the first call.

    Raises:
        UserError: a file is missing, damaged or holds something other than tensors. The cache cannot be written.
    """
    files = _bin_files(folder)
    try:
        target = user_cache() / FOLDER / _digest(folder, files)
    except zipfile.BadZipFile as error:
        raise UserError(f"a file of {folder} is damaged: {error}") from None
    if not target.exists():
        try:
            make_once(target, lambda made: _convert(folder, files, made))
        except (OSError, SafetensorError) as error:  # the second, too, where the disk is full
            raise UserError(f"{folder} cannot be converted to safetensors in {target}: {one_line(error)}") from None
    return target


def _bin_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    names = indexed_names(folder / INDEX)
    files = [folder / name for name in names]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing; {INDEX} names it")
    check_no_surplus(folder, BIN_FILES, names, INDEX)
    return files


def _digest(folder: Path, files: list[Path]) -> str:
    """Computes a digest of the contents.

    torch's files are zip archives. Their directory holds a checksum of every tensor.
    """
    digest = hashlib.sha256()
    for path in sorted(named_files(folder, (*KEPT, INDEX))):
        digest.update(path.name.encode() + path.read_bytes())
    for path in files:
        digest.update(path.name.encode())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
            digest.update(repr(entries).encode())
        else:  # written by torch before 1.6
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _convert(folder: Path, files: list[Path], made: Path) -> None:
    log.info("converting %s to safetensors, once", folder)
    weight_files = [weight_file for path in files for weight_file in _plan_weight_files(path)]
    seen: dict[str, Path] = {}
    for weight_file in weight_files:
        for name in weight_file.names:
            if name in seen:
                raise UserError(f"{weight_file.source}: {name} is in {seen[name].name}, too")
            seen[name] = weight_file.source
    entries = []
    for i, weight_file in enumerate(weight_files):
        mapped = _load(weight_file.source)  # anew every time: what was read of it before can go
        tensors = {name: mapped[name].clone() for name in weight_file.names}
        entries.append(write_weight_file(made, i, len(weight_files), tensors))
        del mapped, tensors
    write_index(made, entries)
    copy_named(folder, made, KEPT)


def _plan_weight_files(path: Path) -> Iterator[_WeightFile]:
    names: list[str] = []
    size = 0
    for name, tensor in _load(path).items():
        if names and size + tensor.nbytes > WEIGHT_FILE_BYTES:
            yield _WeightFile(path, names)
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield _WeightFile(path, names)


def _load(path: Path) -> dict[str, Tensor]:
    """Returns tensors by name. Those of a zip archive stay on disk until they are touched."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something other than tensors, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, OSError, struct.error) as error:
        raise UserError(f"{path} is damaged: {one_line(error)[:200]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} must hold a dictionary of tensors")
    return tensors


def main() -> int:
    """Says in one line where the converted model is. Converts it first if needed."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder = Path(sys.argv[1])
    try:
        if not needs_conversion(folder):
            raise UserError(f"{folder} holds no .bin weights that need conversion")
        found = converted(folder)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{folder} as safetensors is in {found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
