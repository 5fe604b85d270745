"""launch/examples/quantise.py refuses what llm-compressor cannot quantise, also where that is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from loraprune_ds.files import write_json
from tests.unit.shapes_and_scores import repository


@pytest.mark.parametrize(
    ("config", "text", "line"),
    [
        (None, "text", "error: {model}/config.json does not exist"),
        ({}, None, "error: {text} does not exist"),
        (
            {"auto_map": {}},
            "text",
            "error: {model} has layers of different widths, or no stock class; prune with prune.",
        ),
    ],
)
def test_what_cannot_be_quantised_is_one_line(config: object, text: str | None, line: str, tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "text.txt"
    if config is not None:
        write_json(model / "config.json", config)
    if text is not None:
        path.write_text(text)
    command = [sys.executable, str(repository() / "launch/examples/quantise.py"), str(model), str(path), "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith(line.format(model=model, text=path))
    assert ended.stderr.count("\n") == 1
