"""Finds the folder of a pretrained model: local, embedded or from the hub.

Ranks read their shards from safetensors. `.bin` files are converted once per node, in the user's cache.
"""

import hashlib
import logging
import pickle
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, first_line, one_line
from loraprune_ds.files import file_identity, make_once, user_cache
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.weight_files import (
    ADAPTER_WEIGHTS,
    DOCUMENTS,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_no_surplus,
    indexed_names,
    named_files,
    write_index,
    write_weight_file,
)

EMBEDDED = "embedded"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
HUB_BIN_FILES = ["pytorch_model*.bin"]  # only where there are no safetensors
# The bases are errors of the hub's HTTP library. It raises them when a connection is lost midway.
HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)  # type: ignore[assignment]
BIN_FILE, BIN_FILES, BIN_INDEX = "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"
CONVERTED = "loraprune_ds/converted"
COPIED = ("config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, *DOCUMENTS)

log = logging.getLogger(__name__)


def locate_model(config: ModelConfig) -> Path:
    """Finds the local folder of `model.path`: a folder, the embedded default, or a hub id, which is downloaded."""
    if config.path == EMBEDDED:
        return embedded_model_dir()
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
            raise UserError(f"model.path: folder {config.path} does not exist")
        folder = _download(config)
    has_bin = (folder / BIN_INDEX).is_file() or (folder / BIN_FILE).is_file()
    has_safetensors = any(path.name != ADAPTER_WEIGHTS for path in folder.glob("*.safetensors"))
    return converted(folder) if has_bin and not has_safetensors else folder


def _download(config: ModelConfig) -> Path:
    try:
        folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(config.path, revision=config.revision, allow_patterns=HUB_BIN_FILES)
        return folder
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"model.path: no folder {config.path}, and not available from the hub: {reason}") from None


def converted(folder: Path) -> Path:
    """Returns the folder of the same model as safetensors, which the first call writes."""
    files = _bin_files(folder)
    copied = sorted(named_files(folder, COPIED))
    identity = repr([(path.name, file_identity(path)) for path in (*copied, *files)])
    target = user_cache() / CONVERTED / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not target.exists():
        log.info("converting %s to safetensors, once", folder)
        try:
            make_once(target, lambda made: _convert(files, copied, made))
        except (OSError, SafetensorError) as error:  # a full disk can raise either
            raise UserError(f"{folder} cannot be converted to safetensors in {target}: {one_line(error)}") from None
    return target


def _bin_files(folder: Path) -> list[Path]:
    if not (folder / BIN_INDEX).is_file():
        return [folder / BIN_FILE]
    names = indexed_names(folder / BIN_INDEX)
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder / missing[0]} is missing; {BIN_INDEX} names it")
    check_no_surplus(folder, BIN_FILES, names, BIN_INDEX)
    return [folder / name for name in names]


def _convert(files: list[Path], copied: list[Path], made: Path) -> None:
    """Writes one safetensors file for each `.bin` file, which is mapped and not read."""
    found_in: dict[str, str] = {}
    entries = []
    for i, path in enumerate(files):
        tensors = _load(path)
        if twice := tensors.keys() & found_in.keys():
            raise UserError(f"{path}: {min(twice)} is in {found_in[min(twice)]}, too")
        found_in |= dict.fromkeys(tensors, path.name)
        entries.append(write_weight_file(made, i, len(files), tensors))
    write_index(made, entries)
    for path in copied:
        shutil.copy(path, made)


def _load(path: Path) -> dict[str, Tensor]:
    """Maps a file's tensors. Copies those that share memory, such as a tied head, which safetensors would refuse."""
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
