"""Progress in a log file has no live line, on a terminal it has one, and time left follows the latest steps."""

import io
import os
import pty

import pytest

from loraprune_ds.train.progress import Progress, TimeLeft
from tests.unit.run_records import cut_record, step_record


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(progress: Progress, clock: Clock, first: int, last: int, seconds: float) -> None:
    for step in range(first, last + 1):
        clock.now += seconds
        progress.write(step_record(step, seconds=seconds))


def test_a_log_file_gets_whole_lines_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(12, stream=stream, every_seconds=5, clock=clock)
    steps(progress, clock, 1, 12, seconds=2.0)
    progress.close()
    text = stream.getvalue()
    assert "\r" not in text
    assert "\x1b" not in text
    shown = [line.split("/")[0] for line in text.splitlines()]
    assert shown == ["step  1", "step  4", "step  7", "step 10", "step 12"]  # the first, one per 5 s, the last


def test_a_terminal_gets_one_live_line() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(2, stream=stream, clock=clock)
    steps(progress, clock, 1, 1, seconds=2.0)
    progress.write(cut_record(1, before=2000, after=1000, reached=0.2))
    steps(progress, clock, 2, 2, seconds=2.0)
    progress.close()
    lines = stream.getvalue().split("\n")
    assert [line for line in lines if "step 1  cut to 20.0 %" in line] != []
    assert "\rstep 0/2" in lines[0]
    assert "step 2/2" in lines[-2]
    assert lines[-1] == ""  # the cursor is on a line of its own
    assert len(lines) == 3  # one line for the cut, one that stays


def test_a_terminal_without_a_width_gets_whole_lines() -> None:
    """The terminal of `script` and of some containers has none. A live line would be cut to nothing."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as shown:
        progress = Progress(2, stream=stream, clock=Clock())
        progress.write(step_record(1))
        progress.close()
        assert shown.read(1000).startswith(b"step 1/2  ")


def test_time_left_follows_the_latest_steps() -> None:
    time_left = TimeLeft(window=4)
    assert time_left.seconds(10) is None
    time_left.add_step(30.0)  # the warm-up tells nothing of the steps to come
    assert time_left.seconds(10) is None
    time_left.add_step(4.0)
    assert time_left.seconds(10) == 40
    for _ in range(3):
        time_left.add_step(4.0)
    assert time_left.seconds(10) == 40
    for _ in range(4):
        time_left.add_step(1.0)
    assert time_left.seconds(10) == 10  # steps are faster after a cut
    time_left.add_cut(2.0)
    assert time_left.seconds(10) == pytest.approx(15)  # (4 · 1 + 2) / 4 seconds for each
