"""Keeps the result file of the last heavy run: what was compared, the tool, and the differences."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loraprune_ds.report.provenance import hardware, versions

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "export_formats.json"


def record(tool: str, version: str, rows: list[dict[str, Any]]) -> None:
    """Replaces what the file says about one tool."""
    results = json.loads(FILE.read_text()) if FILE.is_file() else {}
    results[tool] = {
        "version": version,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "hardware": hardware("cpu"),
        "rows": rows,
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(results, indent=1) + "\n")
