"""Keeps what a part finds. Each row is written immediately. A part that is cut off loses none."""

from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json


class Found:
    """Adds to the JSON file of a part, which is there already."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = read_json(path)

    def row(self, what: str, measured: float, planned: float | None = None, **details: Any) -> None:
        """Adds a row of the table at the end. `details` are in the file alone."""
        self._content.setdefault("rows", []).append({"what": what, "planned": planned, "measured": measured, **details})
        self._write()

    def keep(self, **details: Any) -> None:
        """Keeps more than fits into a row."""
        self._content |= details
        self._write()

    def _write(self) -> None:
        write_json(self._path, self._content)
