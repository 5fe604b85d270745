"""Keeps the result files of the last heavy run: what was compared, the tool, and the differences."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.provenance import hardware, versions

FILES = Path(__file__).parents[2] / "benchmarks" / "results"
FILE, MEMORY_FILE = FILES / "export_formats.json", FILES / "server_memory.json"


def record(tool: str, version: str, rows: list[dict[str, Any]], file: Path = FILE) -> None:
    """Replaces what a file says about one tool."""
    results = read_json(file) if file.is_file() else {}
    results[tool] = {
        "version": version,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "hardware": hardware("cpu"),
        "rows": rows,
    }
    write_json(file, results)
