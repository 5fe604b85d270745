"""Passes records on to the history, metrics.jsonl, the reporters and the progress display, and writes the results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.checkpoint.run_folder import (
    KEPT_GROUPS_PICTURE,
    METRICS_FILE,
    ROUTER_PICTURE,
    TENSORBOARD_FOLDER,
    TRAINING_PICTURE,
)
from loraprune_ds.config import RunConfig
from loraprune_ds.faults import fail_point
from loraprune_ds.files import write_text
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.report.metrics import MetricsLog, TensorBoardLog, read_metrics
from loraprune_ds.report.pictures import draw_kept_groups, draw_router_load, draw_training
from loraprune_ds.report.records import (
    CutRecord,
    EvaluationRecord,
    History,
    PictureSink,
    Record,
    Sink,
    StepRecord,
    history_from,
)
from loraprune_ds.report.report import Outcome, make_report, write_kept_groups, write_report
from loraprune_ds.report.reporters import SERVICES, ReportedRun
from loraprune_ds.train.progress import Progress
from loraprune_ds.zero.device import device_name


class Recorder:
    """Adds records to a history and passes them on to the sinks, which only rank 0 has."""

    def __init__(self, history: History, sinks: Sequence[Sink]) -> None:
        self.history, self.sinks = history, list(sinks)

    def write(self, record: Record) -> None:
        match record:
            case StepRecord():
                self.history.steps.append(record)
            case CutRecord():
                self.history.cuts.append(record)
            case EvaluationRecord():
                self.history.evaluations.append(record)
        for sink in self.sinks:
            sink.write(record)

    def write_results(
        self, folder: Path, settings: dict[str, Any], dense: ModelShape, outcome: Outcome, peak_bytes: list[int]
    ) -> None:
        """Writes report, kept groups and pictures, and sends the pictures to the sinks. On rank 0 only."""
        kept, pictures = outcome.kept_of_dense, [folder / TRAINING_PICTURE, folder / KEPT_GROUPS_PICTURE]
        write_kept_groups(folder, kept, dense)
        write_report(folder, make_report(settings, self.history, dense, outcome, peak_bytes, device_name()))
        fail_point("finish.reported")
        draw_training(pictures[0], self.history)
        draw_kept_groups(pictures[1], dense, kept)
        draw_router_load(folder / ROUTER_PICTURE, dense, kept, self.history)
        self.show_pictures(pictures)

    def show_pictures(self, paths: Sequence[Path]) -> None:
        """Sends pictures to the sinks that take them."""
        for sink in self.sinks:
            if isinstance(sink, PictureSink):
                for path in paths:
                    sink.picture(path)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class RunRecorder(Recorder):
    """Records a run of our own trainer: also in metrics.jsonl and on the progress display."""

    def __init__(
        self, config: RunConfig, folder: Path, steps: int, checkpoint: TrainingCheckpoint | None, *, active: bool
    ) -> None:
        super().__init__(History(), [])
        self._progress: Progress | None = None
        self._metrics: MetricsLog | None = None
        if not active:
            return
        self._metrics = metrics = MetricsLog(folder / METRICS_FILE)
        first = checkpoint.state.step if checkpoint else 0
        if not checkpoint:
            metrics.truncate()
        else:
            metrics.truncate_to(first)  # the steps after a killed run's last checkpoint are made again
            self.history = history_from(read_metrics(folder / METRICS_FILE))
        self.sinks.append(metrics)
        given = config.logging.report_to
        report_to = ["tensorboard"] if given is None else given
        if "tensorboard" in report_to:
            self.sinks.append(TensorBoardLog(folder / TENSORBOARD_FOLDER, first if checkpoint else None))
        self._progress = Progress(steps, first=first)
        self.sinks.append(self._progress)
        for name in (name for name in SERVICES if name in report_to):
            self.sinks.append(ReportedRun(name, folder, config.to_dict(), self.show))

    def show(self, line: str) -> None:
        """Shows a line next to the progress."""
        if self._progress is not None:
            self._progress.show(line)

    def flush(self) -> None:
        """Forces metrics.jsonl to the disk."""
        if self._metrics is not None:
            self._metrics.flush()


def take_over_metrics(checkpoint: TrainingCheckpoint, folder: Path) -> None:
    """Checks the records of the steps before a checkpoint, and copies them if the run resumes in another folder."""
    earlier, own = checkpoint.folder.parents[1] / METRICS_FILE, folder / METRICS_FILE
    read_metrics(earlier, checkpoint.state.step)
    if earlier.resolve() != own.resolve():
        write_text(own, earlier.read_text(encoding="utf-8", errors="replace"))
