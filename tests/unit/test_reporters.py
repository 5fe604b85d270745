"""`logging.report_to` and a Trainer's reporters: a run's records go to wandb, trackio and mlflow, without a network."""

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraprune_ds.config import LoggingConfig, RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.hf.callback import find_reporters
from loraprune_ds.report import reporters
from loraprune_ds.report.records import History, Recorder, Sink
from loraprune_ds.report.reporters import STEP_AXIS, ReportedRun, check_installed
from loraprune_ds.train.recorder import RunRecorder
from tests.support.launching import ROOT
from tests.support.refusals import must_name
from tests.support.run_records import small_run, step_record

SETTINGS = {"seed": 7, "prune": {"ratio": 0.3, "target": None}}


def test_a_run_sends_its_config_records_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := MagicMock())
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = config_from_dict({"output_dir": str(tmp_path), "logging": {"report_to": ["wandb"]}})
    recorder = RunRecorder(config, 10, active=True)
    history = small_run()
    for record in (*history.steps, *history.cuts):
        recorder.write(record)
    recorder.show_pictures([tmp_path / "training.png"])
    recorder.close()
    # Another rank, which reports nothing.
    RunRecorder(config, 10, active=False).close()
    opened = {
        "config": config.to_dict(),
        "name": tmp_path.name,
        "project": "mine",
        "dir": str(tmp_path),
    }
    wandb.init.assert_called_once_with(**opened)
    wandb.define_metric.assert_called_once_with("*", step_metric=STEP_AXIS)
    *values, picture = (call.args[0] for call in wandb.log.call_args_list)
    assert [value[STEP_AXIS] for value in values] == [
        r.step for r in (*history.steps, *history.cuts)
    ]
    assert values[0]["train/loss"] == history.steps[0].loss
    assert values[len(history.steps)]["cut/reached"] == history.cuts[0].reached
    assert picture == {"training": wandb.Image.return_value}
    wandb.Image.assert_called_once_with(str(tmp_path / "training.png"))
    wandb.finish.assert_called_once_with()


@pytest.mark.parametrize(
    ("report_to", "written"), [(None, True), (["tensorboard"], True), ([], False)]
)
def test_tensorboard_gets_the_records_by_default(
    report_to: Any, *, written: bool, tmp_path: Path
) -> None:
    config = RunConfig(output_dir=str(tmp_path), logging=LoggingConfig(report_to=report_to))
    RunRecorder(config, 10, active=True).close()
    assert (tmp_path / "tensorboard").exists() == written


def fake_trackio(failing: str) -> MagicMock:
    """Has a database that fails in the calls of that name."""
    fails = {f"{failing}.side_effect": sqlite3.OperationalError("database is locked\nfor good")}
    return MagicMock(**fails)


@pytest.mark.parametrize("failing", ["log", "Image", "finish"])
def test_an_error_ends_reports_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    """trackio passes on those of sqlite3."""
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio(failing))
    warnings: list[str] = []
    run = ReportedRun("trackio", tmp_path, SETTINGS, warnings.append)
    for step in (1, 2):
        run.write(step_record(step))
    run.picture(tmp_path / "training.png")
    run.close()
    (warning,) = warnings
    assert "trackio" in warning


def test_a_service_that_fails_to_open_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", fake_trackio("init"))
    must_name(
        "logging.report_to trackio locked", ReportedRun, "trackio", tmp_path, SETTINGS, pytest.fail
    )
    (tmp_path / "mlflow.py").write_text("raise AttributeError('numpy has no bool8')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    must_name(
        "logging.report_to mlflow bool8", ReportedRun, "mlflow", tmp_path, SETTINGS, pytest.fail
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporters.importlib.util, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    must_name("logging.report_to trackio", check_installed, ["tensorboard", "trackio"])


# What the real packages do, in a process each. They are optional, so these are skipped without them.

REPORT = """
import sys, json
from pathlib import Path
from loraprune_ds.report.reporters import ReportedRun
from tests.support.run_records import small_run
folder = Path(sys.argv[2])
run = ReportedRun(sys.argv[1], folder, {"seed": 7, "prune": {"ratio": 0.3, "target": None}}, sys.exit)
history = small_run()
for record in (*history.steps, *history.cuts, *history.evaluations):
    run.write(record)
run.picture(folder / "training.png")
run.close()
"""


def report(name: str, folder: Path, **environment: str) -> None:
    """Sends a small run, offline, from a separate process."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    folder.mkdir()
    Figure().savefig(folder / "training.png")
    # the packages may lie elsewhere
    found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    places = {"HOME": str(folder), "PYTHONPATH": found, "PATH": "/usr/bin:/bin"}
    command, environment = [sys.executable, "-c", REPORT, name, str(folder)], places | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_mlflow_writes_a_local_store(tmp_path: Path) -> None:
    store = tmp_path / "store"
    report(
        "mlflow",
        tmp_path / "run",
        MLFLOW_TRACKING_URI=f"file:{store}",
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    (loss,) = store.glob("*/*/metrics/train/loss")
    lines = [line.split() for line in loss.read_text().splitlines()]
    assert [int(step) for _, _, step in lines] == [record.step for record in small_run().steps]
    assert math.isclose(float(lines[0][1]), small_run().steps[0].loss)
    (ratio,) = store.glob("*/*/params/prune.ratio")
    assert ratio.read_text() == "0.3"
    assert not list(store.glob("*/*/params/prune.target"))
    assert list(store.glob("*/*/artifacts/training.png"))


def test_trackio_writes_a_local_database(tmp_path: Path) -> None:
    report("trackio", tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [
            json.loads(row[0])
            for row in connection.execute("select metrics from metrics order by id")
        ]
    history = small_run()
    logged = [row.get(STEP_AXIS) for row in rows if STEP_AXIS in row]
    assert logged == [
        record.step for record in (*history.steps, *history.cuts, *history.evaluations)
    ]


# A Trainer's reporters get sparsity, cuts, bytes and pictures in the step they happen

STEP, CUT = step_record(5), small_run().cuts[0]


def write(sinks: list[Sink], *pictures: Path) -> None:
    recorder = Recorder(History(), sinks)
    recorder.write(STEP)
    recorder.write(CUT)
    recorder.show_pictures(pictures)
    recorder.close()


def test_all_reporters_get_the_curves_and_pictures_of_pruning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


def test_without_an_open_run_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=None))
    write(find_reporters(["wandb", "trackio"], str(tmp_path), None), tmp_path / "training.png")
