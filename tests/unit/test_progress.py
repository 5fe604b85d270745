"""Progress in a log file has no live line, on a terminal it has one, and time left follows the latest steps."""

import io
import json
import os
import pty
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraprune_ds.train import recorder
from loraprune_ds.train.loop import profiled
from loraprune_ds.train.recorder import Progress
from tests.unit.run_records import cut_record, step_record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, steps: int) -> str:
    """Makes steps of 2 s and a cut after the first one."""
    now = 0.0
    progress = Progress(steps, stream=stream, every_seconds=5, clock=lambda: now)
    for step in range(1, steps + 1):
        now += 2
        progress.write(step_record(step, seconds=2))
        if step == 1:
            progress.write(cut_record(1, before=2000, after=1000, reached=0.2))
    progress.close()
    return stream.getvalue()


def test_a_log_file_gets_whole_lines_every_few_seconds() -> None:
    text = shown(io.StringIO(), 12)
    assert not {"\r", "\x1b"} & set(text)
    lines = [line.split("/")[0] for line in text.splitlines() if "cut to" not in line]
    assert lines == ["step  1", "step  4", "step  7", "step 10", "step 12"]  # the first, one per 5 s, the last


def test_a_terminal_gets_one_live_line() -> None:
    lines = shown(Terminal(), 2).split("\n")
    assert "\rstep 0/2" in lines[0]
    assert [line for line in lines if "step 1  cut to 20.0 %" in line] != []
    assert "step 2/2" in lines[-2]
    assert lines[-1] == ""  # the cursor is on a new line
    assert len(lines) == 3  # one line for the cut, one that stays


def test_a_terminal_without_a_width_gets_whole_lines() -> None:
    """The terminal of `script` and of some containers has none. A live line would be cut to nothing."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as seen:
        progress = Progress(2, stream=stream)
        progress.write(step_record(1))
        progress.close()
        assert seen.read(1000).startswith(b"step 1/2  ")


def clock(line: str) -> str:
    return line.split("/100  ")[1].split("  ")[0]


def test_time_left_follows_the_latest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "LATEST", 4)
    shown = Progress(100, stream=(stream := io.StringIO()), every_seconds=0, clock=lambda: 0.0)
    left = []
    for step, seconds in enumerate([30, 4, 4, 4, 4, 1, 1, 1, 1], start=1):  # the first one is a warm-up
        shown.write(step_record(step, seconds=seconds))
        left.append(clock(stream.getvalue().splitlines()[-1]))
    assert left[:2] == ["0:00", "0:00, 6:32 left"]  # 98 steps of 4 s
    assert left[-1] == "0:00, 1:31 left"
    shown.write(replace(cut_record(9, before=2000, after=1000, reached=0.2), seconds=4.0))
    assert clock(shown._step_line(step_record(10))) == "0:00, 3:00 left"  # 90 of (4 · 1 + 4) / 4 s


def test_named_steps_leave_a_trace(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        with profiled(tmp_path / "profile", step, [2]):
            torch.mm(torch.ones(4, 4), torch.ones(4, 4))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-2.json"]
    events = json.loads((tmp_path / "profile" / "step-2.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    with profiled(tmp_path / "none", 1, ()):
        pass
    assert not (tmp_path / "none").exists()
