"""The headers of a folder's weight files: names, shapes and types of all tensors. No weight is read."""

import os
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model.weight_files import INDEX_FILE

WEIGHT_FILES = "model-*-of-*.safetensors"
Headers = dict[str, tuple[tuple[int, ...], str, Path]]  # tensor name -> (shape, dtype, file)


def read_headers(folder: Path) -> Headers:
    """Opens all weight files, which checks that the length of each matches its header."""
    names = weight_file_names(folder)
    headers: Headers = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise UserError(f"{path} is missing; {INDEX_FILE} names it")
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
    check_no_surplus(folder, WEIGHT_FILES, names, INDEX_FILE)
    return headers


def weight_file_names(folder: Path) -> list[str]:
    """Lists the weight files of a folder, by its index if it has one.

    Raises:
        UserError: there is none, or the index is wrong.
    """
    if (folder / INDEX_FILE).is_file():
        return indexed_names(folder / INDEX_FILE)
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if not names:
        raise UserError(f"{folder} has no safetensors files")
    return names


def indexed_names(index: Path) -> list[str]:
    """Lists the weight files that an index names. They lie beside it.

    Raises:
        UserError: it names none, or one in another folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if Path(str(name)).name != str(name):
            raise UserError(f"{index}: {tensor} is in {name}; only files beside the index are read")
    return sorted(set(map(str, weight_map.values())))


def check_no_surplus(folder: Path, pattern: str, names: Collection[str], index: str) -> None:
    """Checks that the index of a folder's weight files names all of them.

    Raises:
        UserError: a file that looks like a weight file is none of `names`.
    """
    if surplus := sorted(path for path in folder.glob(pattern) if path.name not in names):
        raise UserError(f"{surplus[0]} is one weight file too many; {index} does not name it")
