"""A Trainer's reporters get sparsity, cuts and bytes in the step they happen."""

import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from loraprune_ds.hf.reporters import find_reporters
from loraprune_ds.report.records import show_pictures
from tests.unit.run_records import small_run, step_record

STEP, CUT = step_record(5), small_run().cuts[0]


def test_wandb_and_trackio_get_the_curves_of_pruning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: dict[str, list[dict[str, Any]]] = {"wandb": [], "trackio": []}
    for name, lines in logged.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(log=lines.append))
    for sink in find_reporters(["wandb", "trackio"], str(tmp_path), None):
        sink.write(STEP)
        sink.write(CUT)
        sink.close()
    for lines in logged.values():
        first, second = lines
        assert first["pruning/sparsity"] == 0.2
        assert (first["train/global_step"], second["train/global_step"]) == (5, 4)
        assert second["pruning/cut/reached"] == CUT.reached
        assert not {"train/loss", "pruning/loss"} & first.keys()  # the Trainer logs these


def test_tensorboard_gets_a_run_beside_the_trainer_s(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for sink in find_reporters(["tensorboard"], str(tmp_path), None):
        sink.write(STEP)
        sink.write(CUT)
        sink.close()
    events = EventAccumulator(str(tmp_path / "runs/pruning")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("pruning/sparsity")] == [(5, 0.2)]
    assert [e.step for e in events.Scalars("pruning/cut/bytes_sent")] == [4]


def test_reporters_get_the_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow too, though the Trainer has ended its run by then."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Figure(figsize=(1, 1)).savefig(path := tmp_path / "training.png")
    sent: list[Any] = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="the run"))
    mlflow = SimpleNamespace(
        active_run=lambda: run,
        log_metrics=lambda values, step: None,
        log_artifact=lambda file, run_id: sent.append((file, run_id)),
    )
    wandb = SimpleNamespace(log=sent.append, Image=lambda file: f"image of {file}")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sinks = find_reporters(["tensorboard", "wandb", "mlflow"], str(tmp_path), None)
    for sink in sinks:
        sink.write(CUT)
    mlflow.active_run = lambda: None
    show_pictures(sinks, [path])
    for sink in sinks:
        sink.close()
    assert sent[1:] == [{"training": f"image of {path}"}, (str(path), "the run")]
    events = EventAccumulator(str(tmp_path / "runs/pruning")).Reload()
    assert len(events.Images("training")) == 1


def test_without_an_open_run_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    sinks = find_reporters(["wandb", "trackio"], str(tmp_path), None)
    for sink in sinks:
        sink.write(CUT)
    show_pictures(sinks, [tmp_path / "training.png"])


def test_a_reporter_that_fails_does_not_end_the_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(_: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    logged: list[Any] = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append))
    sinks = find_reporters(["trackio", "wandb"], str(tmp_path), None)
    for sink in sinks:
        sink.write(STEP)
        sink.write(STEP)
    assert len(logged) == 2
    line = "report_to trackio gets no more: OperationalError: database is locked\n"
    assert capsys.readouterr().err == line
