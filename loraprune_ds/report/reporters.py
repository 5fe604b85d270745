"""Sends records to wandb, trackio and mlflow: to a new run, or to the one that a Trainer has opened.

The services are optional packages with their own settings, such as `WANDB_MODE=offline` or `MLFLOW_TRACKING_URI`.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraprune_ds.errors import RankError, first_line, require
from loraprune_ds.report.metrics import scalars
from loraprune_ds.report.records import Record

PROJECT = "loraprune_ds"
STEP_AXIS = "train/global_step"  # as in transformers. A resumed run may go back on it
Curves = Callable[[Record], dict[str, float]]


@dataclass(frozen=True)
class Service:
    """Holds what differs between the services. Each function gets the imported module first.

    Attributes:
        start: opens a run, by its folder and settings.
        find_run: returns the open run or None.
        log: takes values and their step.
        picture: takes a file and a run, which may have ended already.
        finish: closes the run.
    """

    start: Callable[[Any, Path, dict[str, Any]], object]
    find_run: Callable[[Any], Any]
    log: Callable[[Any, dict[str, float], int], object]
    picture: Callable[[Any, Path, Any], object]
    finish: Callable[[Any], object]


def _start_wandb(wandb: Any, folder: Path, settings: dict[str, Any]) -> None:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    wandb.init(project=project, name=folder.name, dir=str(folder), config=settings)
    wandb.define_metric("*", step_metric=STEP_AXIS)


def _start_trackio(trackio: Any, folder: Path, settings: dict[str, Any]) -> None:
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trackio.init(project=project, name=folder.name, config=settings, resume="allow", embed=False)


def _start_mlflow(mlflow: Any, folder: Path, settings: dict[str, Any]) -> None:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 take minutes, in which all ranks wait
    if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
        mlflow.set_experiment(PROJECT)
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params(dict(_flat(settings)))


def _log(module: Any, values: dict[str, float], step: int) -> None:
    module.log(values | {STEP_AXIS: step})


def _picture(module: Any, path: Path, run: Any) -> None:
    module.log({path.stem: module.Image(str(path))})


WANDB = Service(
    start=_start_wandb,
    find_run=lambda wandb: getattr(wandb, "run", wandb),  # None where it is switched off
    log=_log,
    picture=_picture,
    finish=lambda wandb: wandb.finish(),
)
SERVICES = {
    "wandb": WANDB,
    "trackio": replace(WANDB, start=_start_trackio, find_run=lambda trackio: trackio),
    "mlflow": Service(
        start=_start_mlflow,
        find_run=lambda mlflow: mlflow.active_run(),
        log=lambda mlflow, values, step: mlflow.log_metrics(values, step=step),
        picture=lambda mlflow, path, run: mlflow.log_artifact(str(path), run_id=run.info.run_id),
        finish=lambda mlflow: mlflow.end_run(),
    ),
}


def check_installed(report_to: Iterable[str]) -> None:
    """Checks that the packages of all services are installed."""
    for name in report_to:
        there = name not in SERVICES or importlib.util.find_spec(name) is not None
        require(there, f"logging.report_to names {name}, which is not installed; pip install {name}")


class ModuleLog:
    """Logs to a run that was opened elsewhere. An error ends the reports, not the run."""

    def __init__(self, name: str, warn: Callable[[str], None], curves: Curves = scalars) -> None:
        self._name, self._service, self._warn, self._curves = name, SERVICES[name], warn, curves
        self._run: Any = None
        self._works = True

    def write(self, record: Record) -> None:
        values = self._curves(record)
        self._try(lambda: self._log(values, record.step))

    def picture(self, path: Path) -> None:
        """Sends a picture, possibly after the Trainer has ended the run."""
        if self._run is not None:
            self._try(lambda: self._service.picture(sys.modules[self._name], path, self._run))

    def close(self) -> None: ...

    def _log(self, values: dict[str, float], step: int) -> None:
        module: Any = sys.modules.get(self._name)  # whoever opened the run has imported it
        if module is not None and (run := self._service.find_run(module)) is not None:
            self._run = run
            self._service.log(module, values, step)

    def _try(self, send: Callable[[], object]) -> None:
        if self._works and (failure := _failure(send)):
            self._works = False
            self._warn(f"report_to {self._name} gets no more: {failure}")


class ReportedRun(ModuleLog):
    """Opens a new run with the settings and logs to it. Raises RankError if it cannot be opened."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any], warn: Callable[[str], None]) -> None:
        super().__init__(name, warn)
        if failure := _failure(lambda: self._open(folder, settings)):
            raise RankError(f"logging.report_to {name}: {failure}")

    def close(self) -> None:
        self._try(lambda: self._service.finish(sys.modules[self._name]))

    def _open(self, folder: Path, settings: dict[str, Any]) -> None:
        module = importlib.import_module(self._name)
        self._service.start(module, folder, settings)
        self._run = self._service.find_run(module)


def _failure(call: Callable[[], object]) -> str | None:
    """Calls a service. Returns its error in one line, which may be one of a library below it, such as sqlite3."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # no list of their classes would be complete, and none may end a run
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of all sections under dotted keys, without those that are None."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value
