"""The headers of a folder's weight files: names, shapes and types of all tensors. No weight is read."""

import os
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json

WEIGHT_FILES = "model-*-of-*.safetensors"
Headers = dict[str, tuple[tuple[int, ...], str, Path]]  # tensor name -> (shape, dtype, file)


def read_headers(folder: Path) -> Headers:
    """Opens all weight files, which checks that the length of each matches its header."""
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
    headers: Headers = {}
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
