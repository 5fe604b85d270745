"""The parts of tests/gpu.sh: each has a function, results are kept, failed parts are tried again, time is kept."""

import sys
from pathlib import Path

import pytest

from loraprune_ds.files import read_json
from tests.benchmarks.gpu_day import __main__ as day
from tests.benchmarks.gpu_day.found import Found


def test_a_second_call_tries_only_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[str] = []

    def run_part(part: str, path: Path, seconds: float) -> str | None:
        called.append(part)
        assert 0 < seconds <= 480
        assert read_json(path)["error"] == day.CUT_OFF  # which stays, if somebody kills all of it
        Found(path).row("seconds", 3.14159, 2)
        return "Traceback\nOutOfMemoryError: 80 GB\n" if (part, called.count(part)) == ("training.cuts", 1) else None

    monkeypatch.setattr(day, "run_part", run_part)
    monkeypatch.setattr(day, "card_name", lambda: "NVIDIA H100 80GB")
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    assert [day.main(), day.main()] == [1, 0]
    assert called == [*day.PARTS, "training.cuts"]
    found = read_json(tmp_path / "NVIDIA-H100-80GB" / "training.cuts.json")
    assert found["card"] == "NVIDIA H100 80GB"
    assert found["versions"]["torch"]
