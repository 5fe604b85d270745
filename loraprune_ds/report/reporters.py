"""Shows records as curves in TensorBoard, wandb, trackio and mlflow.

The last three are optional packages with their own settings, such as `WANDB_MODE=offline` or `MLFLOW_TRACKING_URI`.
Records go to a new run, or to the open run of a Trainer.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraprune_ds.config_file import dotted_values
from loraprune_ds.errors import RankError, first_line
from loraprune_ds.files import JsonObject, writes_into
from loraprune_ds.report.records import CutRecord, EvaluationRecord, Record, Sink, StepRecord

PROJECT = "loraprune_ds"
STEP_AXIS = "train/global_step"  # as in transformers. A resumed run may repeat values of this axis
Curves = Callable[[Record], dict[str, float]]


def scalars(record: Record) -> dict[str, float]:
    """Returns the record's value for each of its curves."""
    match record:
        case StepRecord():
            return _step_scalars(record)
        case CutRecord():
            curves = ("target", "reached", "removed_fraction", "seconds", "bytes_sent")
            return {f"cut/{name}": getattr(record, name) for name in curves}
        case EvaluationRecord():
            return {f"perplexity/{record.name}": record.perplexity}


def _step_scalars(record: StepRecord) -> dict[str, float]:
    scalars = {
        "train/loss": record.loss,
        "train/learning_rate": record.learning_rate,
        "train/sparsity": record.sparsity,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/tokens_per_second_per_rank": record.tokens_per_second / len(record.weight_bytes),
        "speed/seconds_per_step": record.seconds,
    }
    if record.grad_norm is not None:
        scalars["train/grad_norm"] = record.grad_norm
    for name in ("weight_bytes", "resident_bytes", "peak_bytes", "reserved_bytes"):
        values: list[int] = getattr(record, name)
        if values:
            scalars[f"{name}/min"] = min(values)
            scalars[f"{name}/max"] = max(values)
    return scalars


class TensorBoardLog(Sink):
    """Writes the same records as TensorBoard scalars, in a separate run: two writers hide each other's points."""

    def __init__(
        self, folder: Path, resumed_from: int | None = None, curves: Curves = scalars
    ) -> None:
        # takes half a second, so only runs that use it import it
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resumed_from is None else resumed_from + 1
        self._folder = folder
        self._curves = curves
        with writes_into(folder, RankError):
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, record: Record) -> None:
        with writes_into(self._folder, RankError):
            for tag, value in self._curves(record).items():
                self._writer.add_scalar(tag, value, record.step)
            self._writer.flush()

    def picture(self, path: Path) -> None:
        from matplotlib.image import imread

        self._writer.add_image(path.stem, imread(path), dataformats="HWC")

    def close(self) -> None:
        with writes_into(self._folder, RankError):
            self._writer.close()


class Wandb:
    """The calls of wandb's module. The other services override some."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def start(self, folder: Path, settings: JsonObject) -> None:
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.module.init(project=project, name=folder.name, dir=str(folder), config=settings)
        self.module.define_metric("*", step_metric=STEP_AXIS)

    def open_run(self) -> Any:
        """Returns the open run. None without one, or if wandb is switched off."""
        return getattr(self.module, "run", self.module)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values | {STEP_AXIS: step})

    def picture(self, path: Path, run: Any) -> None:
        """Sends a picture to `run`, which may have ended already."""
        self.module.log({path.stem: self.module.Image(str(path))})

    def finish(self) -> None:
        self.module.finish()


class Trackio(Wandb):
    def start(self, folder: Path, settings: JsonObject) -> None:
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.module.init(
            project=project, name=folder.name, config=settings, resume="allow", embed=False
        )

    def open_run(self) -> Any:
        return self.module


class Mlflow(Wandb):
    def start(self, folder: Path, settings: JsonObject) -> None:
        # its own 7 take minutes, while all ranks wait
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self.module.set_experiment(PROJECT)
        self.module.start_run(run_name=folder.name)
        self.module.log_params(
            {key: value for key, value in dotted_values(settings) if value is not None}
        )

    def open_run(self) -> Any:
        return self.module.active_run()

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log_metrics(values, step=step)

    def picture(self, path: Path, run: Any) -> None:
        self.module.log_artifact(str(path), run_id=run.info.run_id)

    def finish(self) -> None:
        self.module.end_run()


SERVICES = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


class ModuleLog(Sink):
    """Logs to a run that other code has opened. An error ends the reports, not the run."""

    def __init__(self, name: str, warn: Callable[[str], None], curves: Curves = scalars) -> None:
        self._name = name
        self._warn = warn
        self._curves = curves
        self._run: Any = None
        self._works = True

    def write(self, record: Record) -> None:
        values = self._curves(record)
        self._try(lambda: self._log(values, record.step))

    def picture(self, path: Path) -> None:
        """Sends a picture, possibly after the Trainer has ended the run."""
        if self._run is not None:
            self._try(lambda: self._service().picture(path, self._run))

    def _service(self) -> Wandb:
        return SERVICES[self._name](sys.modules[self._name])

    def _log(self, values: dict[str, float], step: int) -> None:
        if self._name not in sys.modules:
            return
        run = self._service().open_run()
        if run is not None:
            self._run = run
            self._service().log(values, step)

    def _try(self, send: Callable[[], object]) -> None:
        if not self._works:
            return
        failure = _failure(send)
        if failure is not None:
            self._works = False
            self._warn(f"stopped reporting to {self._name}: {failure}")


class ReportedRun(ModuleLog):
    """Opens a new run with the settings and logs to it. Raises RankError if it cannot be opened."""

    def __init__(
        self, name: str, folder: Path, settings: JsonObject, warn: Callable[[str], None]
    ) -> None:
        super().__init__(name, warn)

        def start() -> None:
            importlib.import_module(name)
            self._service().start(folder, settings)
            self._run = self._service().open_run()

        failure = _failure(start)
        if failure is not None:
            raise RankError(f"logging.report_to {name}: {failure}")

    def close(self) -> None:
        self._try(lambda: self._service().finish())


def _failure(call: Callable[[], object]) -> str | None:
    """Calls a service. Returns the error in one line, from the service or a library below, such as sqlite3."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # no list of classes would be complete, and no error may end a run
        return f"{type(error).__name__}: {first_line(error)}"
    return None
