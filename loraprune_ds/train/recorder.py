"""Passes records to the history, metrics.jsonl, the reporters and the progress display."""

import math
import os
import sys
import time
from collections import deque
from pathlib import Path
from statistics import fmean
from typing import TextIO

from tqdm import tqdm

from loraprune_ds.config import RunConfig
from loraprune_ds.report import records
from loraprune_ds.report.reporters import SERVICES, ReportedRun, TensorBoardLog
from loraprune_ds.units import format_bytes, format_percent, format_perplexity
from loraprune_ds.versions import can_show

# steps behind the estimate of the time left. Only these, because steps get faster with every cut
LATEST = 10
EVALUATED = {
    "dense": "dense model",
    "after_last_cut": "right after the last cut",
    "pruned": "exported model",
    "step": "held-out text",
}


class ProgressDisplay(records.Sink):
    """Shows steps as they come, and each cut, evaluation and message on a separate line.

    Args:
        steps: of the whole run.
        first: steps done before a resume.
        stream: None: standard error. A terminal gets a live line, any other stream plain lines.
        every_seconds: least time between two step lines outside of a terminal.
    """

    def __init__(
        self,
        steps: int,
        *,
        first: int = 0,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
    ) -> None:
        self.steps = steps
        self._first = first
        self._stream = sys.stderr if stream is None else stream
        self._every_seconds = every_seconds
        self._started = time.monotonic()
        self._last_line = -math.inf  # when it was shown
        self._latest = deque[float](maxlen=LATEST)  # seconds of each step with its cut
        self._bar: tqdm | None = None
        if _can_show_live_line(self._stream):
            self._bar = tqdm(
                total=steps,
                initial=first,
                file=self._stream,
                position=0,  # a bar that a library left open would otherwise push ours down
                bar_format="{desc}  {bar:10}",  # a narrow terminal loses the bar before the numbers
                dynamic_ncols=True,
                miniters=1,
            )
            self._bar.set_description_str(f"step {first}/{steps}")

    def write(self, record: records.Record) -> None:
        match record:
            case records.StepRecord():
                self._step(record)
            case records.CutRecord():
                if self._latest:
                    self._latest[-1] += record.seconds
                self.show(records.cut_line(record))
            case records.EvaluationRecord():
                self.show(
                    f"step {record.step}  perplexity {format_perplexity(record.perplexity)} "
                    f"({EVALUATED[record.name]}, {record.windows} windows)"
                )

    def show(self, line: str) -> None:
        """Shows a line above the live line."""
        if self._bar is None:
            self._stream.write(line + "\n")
            self._stream.flush()
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """Ends the live line, which stays on the screen."""
        if self._bar is not None:
            self._bar.close()

    def _step(self, record: records.StepRecord) -> None:
        if record.step > self._first + 1:  # the first step compiles, allocates and records
            self._latest.append(record.seconds)
        if record.skipped:
            self.show(
                f"step {record.step}  skipped: the fp16 gradients overflowed, the loss scale goes down"
            )
        if self._bar is not None:
            self._bar.set_description_str(self._step_line(record), refresh=False)
            self._bar.update(record.step - self._bar.n)
        elif time.monotonic() - self._last_line >= self._every_seconds or record.step == self.steps:
            self._last_line = time.monotonic()
            self.show(self._step_line(record))

    def _step_line(self, record: records.StepRecord) -> str:
        width = len(str(self.steps))
        clock = tqdm.format_interval(time.monotonic() - self._started)
        if self._latest:
            seconds_left = (self.steps - record.step) * fmean(self._latest)
            clock += f", {tqdm.format_interval(seconds_left)} left"
        parts = [
            f"step {record.step:>{width}}/{self.steps}",
            clock,
            f"loss {record.loss:.3f}",
            f"sparsity {format_percent(record.sparsity)}",
            f"{record.tokens_per_second:,.0f} tok/s",
        ]
        memory = f"mem {format_bytes(max(record.resident_bytes))}"
        if record.reserved_bytes:
            memory += f" of {format_bytes(max(record.reserved_bytes))} reserved"
        return "  ".join([*parts, memory])


def _can_show_live_line(stream: TextIO) -> bool:
    """Returns True for a terminal with a width. tqdm shows nothing at width 0, as in some containers."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:  # an unknown width
        return True


class RunRecorder(records.Recorder):
    """Records a run of our own trainer, also in metrics.jsonl and on the progress display. On rank 0 only."""

    def __init__(
        self, config: RunConfig, steps: int, resumed_from: int | None = None, *, active: bool
    ) -> None:
        super().__init__(records.History(), [])
        if not active:
            return
        folder = Path(config.output_dir)
        report_to = config.logging.reporters
        metrics = records.MetricsLog(folder / records.METRICS_FILE)
        self.history = records.read_history(metrics.path)
        self.sinks.append(metrics)
        if "tensorboard" in report_to and can_show("tensorboard"):
            self.sinks.append(TensorBoardLog(folder / records.TENSORBOARD_FOLDER, resumed_from))
        self.sinks.append(ProgressDisplay(steps, first=resumed_from or 0))
        for name in SERVICES:
            if name in report_to:
                self.sinks.append(ReportedRun(name, folder, config.to_dict(), self.show))

    def show(self, line: str) -> None:
        """Shows a line next to the progress."""
        for sink in self.sinks:
            if isinstance(sink, ProgressDisplay):
                sink.show(line)
