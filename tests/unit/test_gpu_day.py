"""The parts of tests/gpu.sh: each has a function, results are kept, failed parts are tried again, time is kept."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.files import read_json
from tests.benchmarks.gpu_day import __main__ as day


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    parts: list[str] = []

    def run_part(part: str, seconds: float) -> dict[str, Any]:
        parts.append(part)
        assert 0 < seconds <= 480
        if part == "training.cuts" and parts.count(part) == 1:
            return {"error": "Traceback\nOutOfMemoryError: 80 GB\n"}
        return {"rows": [{"what": "seconds", "planned": 2, "measured": 3.14159}]}

    monkeypatch.setattr(day, "run_part", run_part)
    return parts


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(folder), *arguments])
    return day.main()


def test_a_second_call_tries_only_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, called: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, tmp_path) == 1
    assert called == list(day.PARTS)
    assert "error: OutOfMemoryError: 80 GB" in capsys.readouterr().out
    assert call(monkeypatch, tmp_path) == 0
    assert called == [*day.PARTS, "training.cuts"]
    found = read_json(tmp_path / "cpu" / "training.cuts.json")
    assert found["card"] == "cpu"
    assert found["versions"]["torch"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("training.cuts ")]
    assert lines[-1] == ["training.cuts", "seconds", "2", "3.142"]


def test_no_part_is_begun_when_the_time_is_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, called: list[str]
) -> None:
    assert call(monkeypatch, tmp_path, "--minutes", "0.1") == 1
    assert called == []


def test_every_part_exists() -> None:
    for part in day.PARTS:
        module, _, function = part.partition(".")
        assert callable(getattr(importlib.import_module(f"tests.benchmarks.gpu_day.{module}"), function))


def test_a_part_that_fails_leaves_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    found = day.run_part("kernels.none", 60)
    assert found["error"].strip().endswith("(tests/benchmarks/gpu_day/kernels.py)") or "none" in found["error"]
