"""Asks other tools, each by its own Python, and keeps the result files of the last heavy run."""

import os
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.report import hardware, versions
from tests.benchmarks.running import RESULTS

FILE, MEMORY_FILE = RESULTS / "export_formats.json", RESULTS / "server_memory.json"
TAKES_MINUTES = [pytest.mark.heavy, pytest.mark.timeout(2400)]


def python_of(variable: str) -> str:
    """Returns the Python of a tool. Skips the test where there is none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python; see tests/run_heavy.sh")
    return python


def ask(
    python: str, *arguments: str | Path, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs the Python of a tool, which finds nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def selected(request: pytest.FixtureRequest) -> set[str]:
    """Returns the names that the selected tests of a module have as parameter, all of them or those of `-k`."""
    calls = (
        getattr(item, "callspec", None)
        for item in request.session.items
        if item.path == request.path
    )
    return {call.params["name"] for call in calls if call}


def record(
    tool: str,
    version: str,
    rows: list[dict[str, Any]],
    file: Path = FILE,
    cases: Collection[str] = (),
) -> None:
    """Replaces what a file says about one tool. If rows of other `cases` stay, so do version, date and hardware."""
    said, found = read_json(file) if file.is_file() else {}, {row["case"] for row in rows}
    others = [row for row in said.get(tool, {}).get("rows", []) if row["case"] in {*cases} - found]
    facts = {"version": version, "date": datetime.now(UTC).date().isoformat()}
    facts |= {"versions": versions(), "hardware": hardware("cpu")}
    write_json(
        file, said | {tool: facts | (said[tool] if others else {}) | {"rows": others + rows}}
    )
