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
    assert lines[-1] == ""  # the cursor is on a line of its own
    assert len(lines) == 3  # one line for the cut, one that stays


def test_a_terminal_without_a_width_gets_whole_lines() -> None:
    """The terminal of `script` and of some containers has none. A live line would be cut to nothing."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream, os.fdopen(ours, "rb", buffering=0) as seen:
        progress = Progress(2, stream=stream)
        progress.write(step_record(1))
        progress.close()
        assert seen.read(1000).startswith(b"step 1/2  ")


def test_time_left_follows_the_latest_steps() -> None:
    time_left = TimeLeft(window=4)
    time_left.add_step(30.0)  # the warm-up tells nothing of the steps to come
    assert time_left.seconds(10) is None
    for _ in range(4):
        time_left.add_step(4.0)
        assert time_left.seconds(10) == 40
    for _ in range(4):
        time_left.add_step(1.0)
    assert time_left.seconds(10) == 10  # steps are faster after a cut
    time_left.add_cut(2.0)
    assert time_left.seconds(10) == pytest.approx(15)  # (4 · 1 + 2) / 4 seconds for each
