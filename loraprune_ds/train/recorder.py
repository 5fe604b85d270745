"""Where a run's records go: the history for the report, metrics.jsonl, TensorBoard and the progress display."""

from pathlib import Path

from loraprune_ds.checkpoint.load import Saved
from loraprune_ds.config import RunConfig
from loraprune_ds.train.metrics import MetricsLog, TensorBoardLog, read_metrics
from loraprune_ds.train.progress import Progress
from loraprune_ds.train.records import CutRecord, EvaluationRecord, History, Record, Sink, StepRecord, history_from


class Recorder:
    """Writes every record to all sinks on rank 0, and nothing on the others."""

    def __init__(self, config: RunConfig, folder: Path, steps: int, saved: Saved | None, *, active: bool) -> None:
        self.history = History()
        self._sinks: list[Sink] = []
        self._progress: Progress | None = None
        if not active:
            return
        metrics = MetricsLog(folder / "metrics.jsonl")
        first = saved.state.step if saved else 0
        metrics.truncate_to(first if saved else -1)  # what a killed run did after its last checkpoint is done again
        if saved:
            self.history = history_from(read_metrics(folder / "metrics.jsonl"))
        self._sinks.append(metrics)
        if config.logging.tensorboard:
            self._sinks.append(TensorBoardLog(folder / "tensorboard", first if saved else None))
        if config.logging.progress:
            self._progress = Progress(steps, first=first)
            self._sinks.append(self._progress)

    def write(self, record: Record) -> None:
        match record:
            case StepRecord():
                self.history.steps.append(record)
            case CutRecord():
                self.history.cuts.append(record)
            case EvaluationRecord():
                self.history.evaluations.append(record)
        for sink in self._sinks:
            sink.write(record)

    def note(self, text: str) -> None:
        """A line for whoever watches."""
        if self._progress is not None:
            self._progress.note(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
