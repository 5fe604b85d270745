"""Small JSON files that are either whole or not there, and always valid JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line


def finite(value: Any) -> Any:
    """The same nested value with null for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one go: a reader, or a process killed here, sees the old text or the new one.

    One writer only (rank 0). Not forced to the disk: it may be called on every step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return found


def read_json(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    """A JSON file that must hold one object.

    Args:
        unique_keys: refuse a key that is given twice, in what people write; of others the last counts.

    Raises:
        UserError: it is missing, cannot be read or holds something else; the message names the file.
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
