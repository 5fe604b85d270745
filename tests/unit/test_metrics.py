"""metrics.jsonl survives a killed process and can be taken back to a step; TensorBoard and progress show the same."""

import io
import json
import math
import os
import pty
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from loraprune_ds.report.records import (
    EvaluationRecord,
    History,
    MetricsLog,
    Record,
    read_history,
    write_history,
)
from loraprune_ds.report.reporters import TensorBoardLog
from loraprune_ds.train import recorder
from loraprune_ds.train.recorder import ProgressDisplay
from tests.support.refusals import must_name
from tests.support.run_records import cut_record, small_run, step_record

RUN = small_run()
FOREIGN = '{"kind": "evaluation", "step": 1, "name": "pruned", "perplexity": "low", "tokens": 1, "windows": 1}'


def in_order(run: History = RUN) -> list[Record]:
    return sorted([*run.steps, *run.cuts, *run.evaluations], key=lambda record: record.step)


def fill(log: MetricsLog | TensorBoardLog, records: Iterable[Record]) -> None:
    for record in records:
        log.write(record)
    log.close()


def written(path: Path, records: Iterable[Record]) -> Path:
    fill(MetricsLog(path), records)
    return path


def test_numbers_json_cannot_hold_are_null(tmp_path: Path) -> None:
    records: list[Record] = [
        step_record(1, loss=math.nan),
        EvaluationRecord(1, "pruned", math.inf, 1, 1),
    ]
    path = written(tmp_path / "metrics.jsonl", records)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [lines[0]["loss"], lines[1]["perplexity"]] == [None, None]
    assert math.isnan(read_history(path).steps[0].loss)


def test_records_come_back_and_later_steps_are_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", in_order())
    assert read_history(path) == small_run()
    write_history(path, read_history(path, 6))
    written(path, [step_record(7, seconds=42.0)])
    history = read_history(path)
    assert [s.step for s in history.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert history.steps[-1].seconds == 42.0
    assert [c.step for c in history.cuts] == [4, 6]
    assert [e.name for e in history.evaluations] == ["dense", "after_last_cut"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_what_follows_the_checkpoint_may_be_damaged(tmp_path: Path) -> None:
    """A crash of the machine left zeros behind the lines that the checkpoint of step 6 had flushed."""
    path = written(tmp_path / "metrics.jsonl", in_order())
    first_later = next(i for i, record in enumerate(in_order()) if record.step > 6)
    path.write_text("\n".join([*path.read_text().splitlines()[:first_later], "\0" * 40, ""]))
    assert in_order(read_history(path, 6)) == in_order()[:first_later]
    must_name(f"metrics.jsonl line {first_later + 1}", read_history, path, 7)


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", [step_record(1), step_record(2)])
    path.write_text(path.read_text()[:-20])
    assert [step.step for step in read_history(path).steps] == [1]


@pytest.mark.parametrize(
    "damage",
    ["nonsense", "[1, 2]", '{"kind": "step", "step": 1}', '{"kind": "new", "step": 1}', FOREIGN],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "metrics.jsonl", [step_record(1)])
    path.write_text(path.read_text() + damage + "\n")
    must_name("metrics.jsonl line 2", read_history, path)


@pytest.mark.parametrize(
    ("there", "last_step", "missing"),
    [
        ([1, 2, 4, 5], None, 3),
        ([2, 3], None, 1),
        ([1, 2, 5], 5, 3),
        ([1, 2], 4, 3),
        ([], 1, 1),
        ([1, 2, 4], 2, None),
    ],
)
def test_a_missing_step_is_named(
    tmp_path: Path, there: list[int], last_step: int | None, missing: int | None
) -> None:
    """A step missing after the checkpoint is no fault: a crash of the machine may have lost it."""
    path = written(
        tmp_path / "metrics.jsonl",
        [EvaluationRecord(0, "dense", 9.0, 1, 1), *map(step_record, there)],
    )
    if missing is None:
        assert [record.step for record in in_order(read_history(path, last_step))] == [0, 1, 2]
        return
    must_name(f"metrics.jsonl step {missing}", read_history, path, last_step)


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_of_a_gpu_and_of_many_ranks(tmp_path: Path) -> None:
    values = [1000 - rank for rank in range(9)]
    record = replace(step_record(1), weight_bytes=values, reserved_bytes=[7, 8])
    fill(TensorBoardLog(tmp_path), [record])
    found = {tag: value for tag, ((_, value),) in scalars_of(tmp_path).items()}
    spread = {tag: value for tag, value in found.items() if tag.startswith("weight_bytes/")}
    assert spread == {"weight_bytes/min": 992, "weight_bytes/max": 1000}
    assert (found["reserved_bytes/min"], found["reserved_bytes/max"]) == (7, 8)
    assert found["speed/tokens_per_second_per_rank"] == pytest.approx(4096 / 9)


def test_tensorboard_has_each_measured_perplexity(tmp_path: Path) -> None:
    without_norm = replace(step_record(1), grad_norm=None)
    fill(TensorBoardLog(tmp_path), [without_norm, EvaluationRecord(1, "pruned", 12.0, 1, 1)])
    found = scalars_of(tmp_path)
    assert found["perplexity/pruned"] == [(1, 12.0)]
    assert "train/grad_norm" not in found


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    fill(TensorBoardLog(tmp_path), [step_record(step, loss=1.0) for step in range(1, 6)])
    fill(TensorBoardLog(tmp_path, resumed_from=3), [step_record(4, loss=2.0)])
    assert scalars_of(tmp_path)["train/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


# Progress in a log file has no live line, on a terminal it has one


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, steps: int) -> str:
    """Makes steps of 2 s and a cut after the first one."""
    now = 0.0
    with patch.object(recorder.time, "monotonic", lambda: now):
        progress = ProgressDisplay(steps, stream=stream, every_seconds=5)
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
    # the first, one per 5 s, the last
    assert lines == ["step  1", "step  4", "step  7", "step 10", "step 12"]


def test_a_terminal_gets_one_live_line() -> None:
    with tqdm(file=io.StringIO()):  # as a library may leave one open
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
        progress = ProgressDisplay(2, stream=stream)
        progress.write(step_record(1))
        progress.close()
        assert seen.read(1000).startswith(b"step 1/2  ")


def test_a_skipped_step_and_a_perplexity_have_lines_of_their_own() -> None:
    stream = io.StringIO()
    progress = ProgressDisplay(9, stream=stream, every_seconds=1e6)
    progress.write(step_record(1))
    progress.write(step_record(2, skipped=True))
    progress.write(EvaluationRecord(2, "dense", 12.345, 100, 4))
    _, skipped, measured = stream.getvalue().splitlines()
    assert skipped.startswith("step 2  skipped: ")
    assert measured == "step 2  perplexity 12.35 (dense model, 4 windows)"
