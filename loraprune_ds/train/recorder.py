"""Passes a run's records on: to the history for the report, metrics.jsonl, TensorBoard and the progress display."""

from collections.abc import Sequence
from pathlib import Path

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.checkpoint.run_folder import METRICS_FILE, TENSORBOARD_FOLDER
from loraprune_ds.config import RunConfig
from loraprune_ds.files import write_text
from loraprune_ds.report.metrics import MetricsLog, TensorBoardLog, read_metrics
from loraprune_ds.report.records import (
    CutRecord,
    EvaluationRecord,
    History,
    Record,
    Sink,
    StepRecord,
    history_from,
    show_pictures,
)
from loraprune_ds.report.reporters import SERVICES, ReportedRun
from loraprune_ds.train.progress import Progress


def take_over_metrics(checkpoint: TrainingCheckpoint, folder: Path) -> None:
    """Checks the records of the steps before a checkpoint, and copies them if the run goes on in another folder.

    Raises:
        UserError: they are missing or damaged, so the report would lack them.
    """
    earlier, own = checkpoint.folder.parents[1] / METRICS_FILE, folder / METRICS_FILE
    read_metrics(earlier, checkpoint.state.step)
    if earlier.resolve() != own.resolve():
        write_text(own, earlier.read_text(encoding="utf-8", errors="replace"))


class Recorder:
    """Writes every record to all sinks on rank 0, and nothing on the other ranks.

    Attributes:
        history: all records of the run so far.
    """

    def __init__(
        self, config: RunConfig, folder: Path, steps: int, checkpoint: TrainingCheckpoint | None, *, active: bool
    ) -> None:
        self.history = History()
        self._sinks: list[Sink] = []
        self._progress: Progress | None = None
        self._metrics: MetricsLog | None = None
        if not active:
            return
        self._metrics = metrics = MetricsLog(folder / METRICS_FILE)
        first = checkpoint.state.step if checkpoint else 0
        if not checkpoint:
            metrics.truncate()
        else:
            metrics.truncate_to(first)  # what a killed run did after its last checkpoint is done again
            self.history = history_from(read_metrics(folder / METRICS_FILE))
        self._sinks.append(metrics)
        given = config.logging.report_to
        report_to = ["tensorboard"] if given is None else given
        if "tensorboard" in report_to:
            self._sinks.append(TensorBoardLog(folder / TENSORBOARD_FOLDER, first if checkpoint else None))
        self._progress = Progress(steps, first=first)
        self._sinks.append(self._progress)
        for name in (name for name in SERVICES if name in report_to):
            self._sinks.append(ReportedRun(name, folder, config.to_dict(), self.show))

    def write(self, record: Record) -> None:
        """Writes a record to the history and all sinks."""
        match record:
            case StepRecord():
                self.history.steps.append(record)
            case CutRecord():
                self.history.cuts.append(record)
            case EvaluationRecord():
                self.history.evaluations.append(record)
        for sink in self._sinks:
            sink.write(record)

    def show(self, line: str) -> None:
        """Shows a line to the people who watch the progress."""
        if self._progress is not None:
            self._progress.show(line)

    def show_pictures(self, paths: Sequence[Path]) -> None:
        """Sends pictures to the sinks that take them."""
        show_pictures(self._sinks, paths)

    def flush(self) -> None:
        """Forces metrics.jsonl to the disk."""
        if self._metrics is not None:
            self._metrics.flush()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
