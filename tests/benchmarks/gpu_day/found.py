"""Keeps what a part finds. Each row is written immediately. A part that is cut off loses none."""

from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json


class Found:
    """Adds to the JSON file of a part, which is there already."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)

    def row(self, what: str, measured: float, planned: float | None = None, **details: Any) -> None:
        """Adds a row of the table at the end. `details` are in the file alone."""
        rows = read_json(self._path).get("rows", [])
        self.keep(rows=[*rows, {"what": what, "planned": planned, "measured": measured, **details}])

    def keep(self, **details: Any) -> None:
        write_json(self._path, read_json(self._path) | details)
