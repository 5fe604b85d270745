"""Converts `.bin` files (torch's pickles) to safetensors, once per node. Of these a rank can read its shard alone.

A file's tensors are mapped, not read, and one file is written for each. The result is in the user's cache, and is as
large as the source.
"""

import hashlib
import logging
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.files import file_identity
from loraprune_ds.model.folder_files import DOCUMENTS, PROCESSOR_FILES, TOKENIZER_FILES, named_files
from loraprune_ds.model.weight_files import write_index, write_weight_file
from loraprune_ds.model.weight_headers import check_no_surplus, indexed_names
from loraprune_ds.whole import make_once, user_cache

INDEX = "pytorch_model.bin.index.json"
BIN_FILES = "pytorch_model-*-of-*.bin"
FOLDER = "loraprune_ds/converted"
SINGLE = "pytorch_model.bin"
KEPT = ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, *DOCUMENTS)

log = logging.getLogger(__name__)


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
    kept = sorted(named_files(folder, KEPT))
    identity = repr([(path.name, file_identity(path)) for path in (*kept, *files)])
    target = user_cache() / FOLDER / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not target.exists():
        log.info("converting %s to safetensors, once", folder)
        try:
            make_once(target, lambda made: _convert(files, kept, made))
        except (OSError, SafetensorError) as error:  # the second, too, where the disk is full
            raise UserError(f"{folder} cannot be converted to safetensors in {target}: {one_line(error)}") from None
    return target


def _bin_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    names = indexed_names(folder / INDEX)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder / missing[0]} is missing; {INDEX} names it")
    check_no_surplus(folder, BIN_FILES, names, INDEX)
    return [folder / name for name in names]


def _convert(files: list[Path], kept: list[Path], made: Path) -> None:
    found_in: dict[str, str] = {}
    entries = []
    for i, path in enumerate(files):
        tensors = _load(path)
        if twice := tensors.keys() & found_in.keys():
            raise UserError(f"{path}: {min(twice)} is in {found_in[min(twice)]}, too")
        found_in |= dict.fromkeys(tensors, path.name)
        entries.append(write_weight_file(made, i, len(files), tensors))
    write_index(made, entries)
    for path in kept:
        shutil.copy(path, made)


def _load(path: Path) -> dict[str, Tensor]:
    """Maps a file's tensors. Those that share memory, as a tied head does, are copied: safetensors takes none."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged, or older than torch 1.6; load it with torch, and save it again")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something other than tensors, or is damaged") from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)[:200]}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} must hold a dictionary of tensors")
    memory = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    uses = Counter(memory.values())
    return {name: tensor.clone() if uses[memory[name]] > 1 else tensor for name, tensor in tensors.items()}
