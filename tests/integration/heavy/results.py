"""Asks other tools, each by its own Python, and keeps the result files of the last heavy run."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.report import hardware, versions
from tests.benchmarks.running import RESULTS

FILE, MEMORY_FILE = RESULTS / "export_formats.json", RESULTS / "server_memory.json"
TAKES_MINUTES = [
    pytest.mark.heavy,
    pytest.mark.timeout(2400),
    pytest.mark.skipif("LLAMA_CPP_PYTHON" not in os.environ, reason="takes minutes; see tests/run_heavy.sh"),
]


def python_of(variable: str) -> str:
    """Returns the Python of a tool. Skips the test where there is none."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python; see tests/run_heavy.sh")
    return python


def ask(python: str, *arguments: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs the Python of a tool, which finds nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | more
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def record(tool: str, version: str, rows: list[dict[str, Any]], file: Path = FILE) -> None:
    """Replaces what a file says about one tool."""
    facts = {"version": version, "date": datetime.now(UTC).date().isoformat()}
    facts |= {"versions": versions(), "hardware": hardware("cpu")}
    write_json(file, (read_json(file) if file.is_file() else {}) | {tool: facts | {"rows": rows}})
