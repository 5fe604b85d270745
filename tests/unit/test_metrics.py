"""metrics.jsonl survives a killed process and can be taken back to a step; TensorBoard shows the same numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraprune_ds.errors import UserError
from loraprune_ds.report.metrics import MetricsLog, TensorBoardLog, read_metrics
from loraprune_ds.report.records import EvaluationRecord, Record, history_from
from tests.unit.run_records import cut_record, small_run, step_record


def in_order() -> list[Record]:
    run = small_run()
    return sorted([*run.steps, *run.cuts, *run.evaluations], key=lambda record: record.step)


def written(path: Path, records: list[Record]) -> Path:
    log = MetricsLog(path)
    for record in records:
        log.write(record)
    log.close()
    return path


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path / "run" / "metrics.jsonl", in_order())
    assert history_from(read_metrics(path)) == small_run()


def test_each_line_is_on_disk_when_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(cut_record(4, before=2000, after=1000, reached=0.2))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["kind"], line["step"], line["weight_bytes_after"]) == ("cut", 4, [1000, 900])
    log.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_json_cannot_hold_are_null(tmp_path: Path, bad: float) -> None:
    path = written(tmp_path / "metrics.jsonl", [step_record(1, loss=bad), EvaluationRecord(1, "pruned", bad, 1, 1)])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [lines[0]["loss"], lines[1]["perplexity"]] == [None, None]
    assert math.isnan(history_from(lines).steps[0].loss)


def test_truncate_drops_later_steps_and_writing_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", in_order())
    log = MetricsLog(path)
    log.truncate_to(6)
    log.write(step_record(7, seconds=42.0))
    log.close()
    history = history_from(read_metrics(path))
    assert [s.step for s in history.steps] == [1, 2, 3, 4, 5, 6, 7]
    assert history.steps[-1].seconds == 42.0
    assert [c.step for c in history.cuts] == [4, 6]
    assert [e.name for e in history.evaluations] == ["dense", "after_last_cut"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file is left


def test_what_follows_the_checkpoint_may_be_damaged(tmp_path: Path) -> None:
    """A crash of the machine left zeros behind the lines that the checkpoint of step 6 had flushed."""
    path = written(tmp_path / "metrics.jsonl", in_order())
    first_later = next(i for i, line in enumerate(read_metrics(path)) if line["step"] > 6)
    lines = path.read_text().splitlines()[:first_later]
    path.write_text("\n".join([*lines, "\0" * 40, ""]))
    assert len(read_metrics(path, 6)) == first_later
    with pytest.raises(UserError, match=f"line {first_later + 1} is not valid JSON"):
        read_metrics(path, 7)
    log = MetricsLog(path)
    log.truncate()
    log.close()
    assert read_metrics(path) == []


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", [step_record(1), step_record(2)])
    text = path.read_text()
    path.write_text(text[:-20])
    assert [line["step"] for line in read_metrics(path)] == [1]
    written(path, [step_record(2)])
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize(
    "damage", ["nonsense", "[1, 2]", '{"kind": "step", "step": 1}', '{"kind": "other", "step": 1}']
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "metrics.jsonl", [step_record(1)])
    path.write_text(path.read_text() + damage + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is ") as error:
        read_metrics(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("there", "last_step", "missing"),
    [([1, 2, 4, 5], None, 3), ([2, 3], None, 1), ([1, 2, 5], 5, 3), ([1, 2], 4, 3), ([], 1, 1)],
)
def test_a_missing_step_is_named(tmp_path: Path, there: list[int], last_step: int | None, missing: int) -> None:
    path = written(tmp_path / "metrics.jsonl", [EvaluationRecord(0, "dense", 9.0, 1, 1), *map(step_record, there)])
    with pytest.raises(UserError, match=rf"metrics\.jsonl is damaged: the line of step {missing} is missing$"):
        read_metrics(path, last_step)


def test_what_is_missing_behind_the_checkpoint_is_no_fault(tmp_path: Path) -> None:
    """A crash of the machine may have lost it."""
    path = written(tmp_path / "metrics.jsonl", [step_record(1), step_record(2), step_record(4)])
    assert [line["step"] for line in read_metrics(path, 2)] == [1, 2]
    assert read_metrics(path, 0) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def test_tensorboard_has_the_same_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path)
    for record in in_order():
        log.write(record)
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    seconds = {e.step: e.value for e in events.Scalars("speed/seconds_per_step")}
    assert seconds == {s.step: s.seconds for s in small_run().steps}
    assert [e.value for e in events.Scalars("weight_bytes/rank_1")] == [990] * 10
    assert [e.step for e in events.Scalars("cut/reached")] == [4, 6]
    assert events.Scalars("perplexity/pruned")[0].value == pytest.approx(74.23)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("ranks", "expected"), [(8, {f"rank_{rank}": 1000 - rank for rank in range(8)}), (9, {"min": 992, "max": 1000})]
)
def test_tensorboard_of_many_ranks_has_the_least_and_the_most(
    tmp_path: Path, ranks: int, expected: dict[str, float]
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = TensorBoardLog(tmp_path)
    values = [1000 - rank for rank in range(ranks)]
    log.write(replace(step_record(1), weight_bytes=values, resident_bytes=values))
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    for name in ("weight_bytes", "resident_bytes"):
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{name}/")]
        assert {tag.removeprefix(f"{name}/"): events.Scalars(tag)[0].value for tag in tags} == expected


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardLog(tmp_path)
    for step in range(1, 6):
        first.write(step_record(step, loss=1.0))
    first.close()
    second = TensorBoardLog(tmp_path, resumed_from=3)
    second.write(step_record(4, loss=2.0))
    second.close()
    losses = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(e.step, e.value) for e in losses] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def test_lines_of_an_earlier_version_lack_what_came_later(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(step_record(1))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    later = {"reserved_bytes", "mfu", "skipped"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps({k: v for k, v in line.items() if k not in later}) + "\n")
    assert history_from(read_metrics(tmp_path / "metrics.jsonl")).steps == [step_record(1)]


def test_a_gpu_has_curves_of_its_own(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.write(replace(step_record(1), reserved_bytes=[7, 8], mfu=0.25))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert found["speed/mfu"] == 0.25
    assert found["speed/tokens_per_second_per_rank"] == 2048
    assert (found["reserved_bytes/rank_0"], found["reserved_bytes/rank_1"]) == (7, 8)
