"""A Trainer's reporters get sparsity, cuts, bytes and pictures in the step they happen."""

import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraprune_ds.hf.callback import find_reporters
from loraprune_ds.report.records import History, Sink
from loraprune_ds.train.recorder import Recorder
from tests.unit.run_records import small_run, step_record

STEP, CUT = step_record(5), small_run().cuts[0]


def write(sinks: list[Sink], *pictures: Path) -> None:
    recorder = Recorder(History(), sinks)
    recorder.write(STEP)
    recorder.write(CUT)
    recorder.show_pictures(pictures)
    recorder.close()


def test_all_reporters_get_the_curves_and_pictures_of_pruning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLflow gets the picture, too, though the Trainer has ended its run by then."""
    Figure(figsize=(1, 1)).savefig(path := tmp_path / "training.png")
    sent, artifacts = dict[str, list[Any]](wandb=[], trackio=[]), list[Any]()
    for name, lines in sent.items():
        module = SimpleNamespace(log=lines.append, Image=lambda file: f"image of {file}")
        monkeypatch.setitem(sys.modules, name, module)
    runs = iter([SimpleNamespace(info=SimpleNamespace(run_id="the run"))] * 2)
    mlflow = SimpleNamespace(
        active_run=lambda: next(runs, None),
        log_metrics=lambda values, step: None,
        log_artifact=lambda file, run_id: artifacts.append((file, run_id)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    write(find_reporters(["tensorboard", "wandb", "trackio", "mlflow"], str(tmp_path), None), path)
    for first, second, picture in sent.values():
        assert first["pruning/sparsity"] == 0.2
        assert (first["train/global_step"], second["train/global_step"]) == (5, 4)
        assert second["pruning/cut/reached"] == CUT.reached
        assert not {"train/loss", "pruning/loss"} & first.keys()  # the Trainer logs these
        assert picture == {"training": f"image of {path}"}
    assert artifacts == [(str(path), "the run")]
    events = EventAccumulator(str(tmp_path / "runs/pruning")).Reload()  # next to the Trainer's run
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("pruning/sparsity")] == [(5, 0.2)]
    assert [e.step for e in events.Scalars("pruning/cut/bytes_sent")] == [4]
    assert len(events.Images("training")) == 1


def test_without_an_open_run_nothing_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    write(find_reporters(["wandb", "trackio"], str(tmp_path), None), tmp_path / "training.png")


def test_a_reporter_that_fails_does_not_end_the_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(_: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    logged: list[Any] = []
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(log=logged.append))
    write(find_reporters(["trackio", "wandb"], str(tmp_path), None)[1:])  # without the printer of cuts
    assert len(logged) == 2
    line = "report_to trackio gets no more: OperationalError: database is locked\n"
    assert capsys.readouterr().err == line
