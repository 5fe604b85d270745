"""Small text and JSON files, written atomically. The JSON is always valid."""

import json
import math
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.whole import whole_file


def finite(value: Any) -> Any:
    """Replaces NaN and infinities in a nested value by None, because JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically. It is not flushed to the disk, because this may run on every step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, lasting=False) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, like `write_text`."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return found


def read_json(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    """Reads a JSON file that must hold one object. With `unique_keys`, a key given twice is an error.

    Raises:
        UserError: it is missing, unreadable or holds no object. The message names the file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def file_identity(path: Path) -> object:
    """Returns a value that differs after the file has changed. The file is not read."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
