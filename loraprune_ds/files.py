"""Small text and JSON files. They appear whole, and the JSON is always valid."""

import json
import math
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.whole import whole_file


def finite(value: Any) -> Any:
    """Replaces NaN and infinities in a nested value by None, as JSON cannot hold them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go. A reader sees the old text or the new one.

    It is not forced to the disk, as it may be called on every step.
    """
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
    """Reads a JSON file that must hold one object.

    Args:
        unique_keys: refuse a key that is given twice, in files that people write. Otherwise the last one counts.

    Raises:
        UserError: it is missing, cannot be read or holds something else. The message names the file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # neither text nor JSON
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def file_identity(path: Path) -> object:
    """Returns what changes when a file changes. It is not read."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
