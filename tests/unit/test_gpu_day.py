"""The parts of tests/gpu.sh: each has a function, results are kept, failed parts are tried again, time is kept."""

import importlib
import sys
from pathlib import Path

import pytest

from loraprune_ds.files import read_json, write_json
from tests.benchmarks.gpu_day import __main__ as day
from tests.benchmarks.gpu_day.found import Found
from tests.integration.launching import process_state, within


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


def test_every_part_exists() -> None:
    for part in day.PARTS:
        module, _, function = part.partition(".")
        assert callable(getattr(importlib.import_module(f"tests.benchmarks.gpu_day.{module}"), function))


@pytest.mark.timeout(60)
def test_a_part_that_is_cut_off_keeps_its_rows_and_nothing_runs_on(tmp_path: Path) -> None:
    write_json(path := tmp_path / "part.json", {"card": "cpu"})
    hangs = "import subprocess, time\nfound.row('seconds', 1.5)\nchild = subprocess.Popen(['sleep', '600'])\n"
    hangs += "found.keep(pid=child.pid)\nprint('a library says this')\ntime.sleep(600)"
    assert day.run_code(hangs, path, 10) == "no end after 10 s"
    found = read_json(path)
    assert found["rows"] == [{"what": "seconds", "planned": None, "measured": 1.5}]
    within(50, lambda: process_state(found["pid"]) in ("", "Z"))  # killed, and perhaps not reaped by its new parent
