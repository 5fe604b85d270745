"""Progress in a log file has no live line, on a terminal it has one, and time left follows the latest steps."""

import io
import os
import pty
from dataclasses import replace

import pytest

from loraprune_ds.report.records import EvaluationRecord
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


def test_a_step_line_has_all_that_matters() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, stream=stream, clock=clock)
    steps(progress, clock, 1, 1, seconds=2.0)
    assert stream.getvalue() == ("step   1/100  0:02  loss 3.000  sparsity 0.0 %  2,048 tok/s  mem 5.1 GB\n")


def test_cuts_evaluations_and_notes_have_lines_of_their_own() -> None:
    stream = io.StringIO()
    progress = Progress(60, stream=stream)
    progress.show("world size 1: nothing is sharded")
    progress.write(EvaluationRecord(0, "dense", 51.594, 20320, 160))
    progress.write(cut_record(12, before=134_500_000, after=101_200_000, reached=0.25))
    progress.write(step_record(13, skipped=True))
    assert stream.getvalue().splitlines()[:4] == [
        "world size 1: nothing is sharded",
        "step 0  perplexity 51.59 (dense model, 160 windows)",
        "step 12  cut to 25.0 % (target 25.3 %) in 1.23 s, 3.4 MB sent, weights per rank 134.5 MB → 101.2 MB",
        "step 13  skipped: the fp16 gradients overflowed, the loss scale goes down",
    ]


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


def test_a_gpu_shows_utilisation_and_what_its_allocator_holds() -> None:
    stream = io.StringIO()
    record = replace(step_record(1), mfu=0.413, reserved_bytes=[6_000_000_000, 5_500_000_000])
    Progress(10, stream=stream, clock=lambda: 0.0).write(record)
    assert stream.getvalue().endswith("4,096 tok/s  MFU 41.3 %  mem 5.1 GB of 6.0 GB reserved\n")
