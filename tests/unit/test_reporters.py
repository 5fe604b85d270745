"""`logging.report_to` and a Trainer's reporters: a run's records go to wandb, trackio and mlflow, without a network."""

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraprune_ds.config import LoggingConfig, RunConfig
from loraprune_ds.hf.callback import find_reporters
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import History, Recorder
from loraprune_ds.report.reporters import STEP_AXIS, ReportedRun
from loraprune_ds.train.prepare import prepare
from loraprune_ds.train.recorder import RunRecorder
from tests.support.launching import ROOT
from tests.support.refusals import must_name
from tests.support.run_records import small_run, step_record

SETTINGS = {"seed": 7, "prune": {"ratio": 0.3, "target": None}}


@pytest.mark.parametrize(
    ("report_to", "written"), [(None, True), (["tensorboard"], True), ([], False)]
)
def test_tensorboard_gets_the_records_by_default(
    report_to: Any, *, written: bool, tmp_path: Path
) -> None:
    config = RunConfig(output_dir=str(tmp_path), logging=LoggingConfig(report_to=report_to))
    RunRecorder(config, 10, active=True).close()
    assert (tmp_path / "tensorboard").exists() == written


def test_an_error_ends_reports_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "trackio.py").write_text("def init(**settings): pass")  # and no `log`
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
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
    (tmp_path / "mlflow.py").write_text("raise AttributeError('numpy has no bool8')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    must_name(
        "logging.report_to mlflow bool8", ReportedRun, "mlflow", tmp_path, SETTINGS, pytest.fail
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    logging = LoggingConfig(report_to=["tensorboard", "trackio"])
    config = RunConfig(output_dir="out", deepspeed=None, logging=logging)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    must_name("logging.report_to trackio pip", prepare, config, Communicator())


# What the real packages do, in a process each. They are optional; run_heavy.sh installs them.

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
    folder.mkdir()
    Figure().savefig(folder / "training.png")
    # the packages may lie elsewhere
    found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    places = {"HOME": str(folder), "PYTHONPATH": found, "PATH": "/usr/bin:/bin"}
    command, environment = [sys.executable, "-c", REPORT, name, str(folder)], places | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.heavy
def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    report("wandb", folder, WANDB_MODE="offline")
    (written,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert all(name in written.read_bytes() for name in (b"cut/reached", b"training", b"ratio"))


@pytest.mark.heavy
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


@pytest.mark.heavy
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


def test_a_trainers_tensorboard_gets_the_curves_and_pictures_of_pruning(tmp_path: Path) -> None:
    Figure(figsize=(1, 1)).savefig(path := tmp_path / "training.png")
    # wandb has no open run, so nothing is sent there
    recorder = Recorder(History(), find_reporters(["tensorboard", "wandb"], str(tmp_path), None))
    recorder.write(step_record(5))
    recorder.write(small_run().cuts[0])
    recorder.show_pictures([path])
    recorder.close()
    events = EventAccumulator(str(tmp_path / "runs/pruning")).Reload()  # next to the Trainer's run
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("pruning/sparsity")] == [(5, 0.2)]
    assert [e.step for e in events.Scalars("pruning/cut/bytes_sent")] == [4]
    assert len(events.Images("training")) == 1
