"""Keeps tokenised data on disk, so that one rank of a node makes it once and all others map the same memory.

<datasets' cache>/loraprune_ds/<digest>/samples.safetensors   ids and labels
                                        held_out.txt          the text for perplexity

The folder is that of `datasets`: HF_DATASETS_CACHE, or `datasets` in HF_HOME. The digest is that of all that the
samples depend on: data, settings, tokenizer with its chat template, and the code here. Whoever makes new tokens removes
those that no run has read for a month. A run that maps them keeps them.
"""

import dataclasses
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from loraprune_ds.config_data import DataConfig
from loraprune_ds.errors import UserError, one_line
from loraprune_ds.train.data.samples import LoadedData, Samples
from loraprune_ds.train.data.sources import file_identity, source_identity
from loraprune_ds.whole import make_once

SAMPLES_FILE, HELD_OUT_FILE = "samples.safetensors", "held_out.txt"
DIGEST = re.compile("[0-9a-f]{32}")
KEPT_SECONDS = 30 * 86_400


def cached(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, start: int | None, make: Callable[[], LoadedData]
) -> LoadedData:
    """Returns what `make` returns for these settings, from the disk if it was made before.

    Raises:
        UserError: as `make`, or the cache cannot be written or read.
    """
    folder = _cache_folder() / _digest(config, tokenizer, start)
    try:
        if not folder.exists():
            make_once(folder, lambda made: _write(make(), made))
            _remove_old(folder.parent)
        with suppress(OSError):  # it may be somebody else's
            os.utime(folder)  # its last use
        return _read(folder)
    except (OSError, SafetensorError) as error:  # the second, too, where the disk is full
        raise UserError(f"the tokens of data.path cannot be kept in {folder}: {one_line(error)}") from None


def _remove_old(cache: Path) -> None:
    """Removes tokens that were not used for long. Other folders stay."""
    for folder in cache.iterdir():
        with suppress(FileNotFoundError):  # another rank of another run was faster
            if DIGEST.fullmatch(folder.name) and folder.stat().st_mtime < time.time() - KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _cache_folder() -> Path:
    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return Path(datasets).expanduser() / "loraprune_ds"


def _digest(config: DataConfig, tokenizer: PreTrainedTokenizerBase, start: int | None) -> str:
    sources = [source_identity(source) for source in config.sources]
    held_out = [Path(path).expanduser() for path in (config.held_out,) if path]
    files = [file_identity(path) for path in held_out if path.exists()]
    digest = hashlib.sha256(repr((dataclasses.asdict(config), sources, files, start)).encode())
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted([*Path(scratch).rglob("*.*"), *Path(__file__).parent.glob("*.py")]):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _write(data: LoadedData, folder: Path) -> None:
    tensors = data.samples.tensors() | ({} if data.epoch is None else {"epoch": data.epoch})
    numbers = {"window": str(data.samples.window), "left_out": str(data.samples.left_out)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SAMPLES_FILE, numbers)
    (folder / HELD_OUT_FILE).write_bytes(data.held_out.encode())


def _read(folder: Path) -> LoadedData:
    with safe_open(folder / SAMPLES_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # they map the file
        numbers = {name: int(value) for name, value in file.metadata().items()}
    held_out = (folder / HELD_OUT_FILE).read_bytes().decode()
    epoch = tensors.pop("epoch", None)
    return LoadedData(Samples.of_tensors(tensors, **numbers), held_out, epoch)
