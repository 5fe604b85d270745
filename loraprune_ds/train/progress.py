"""Shows a run: one live line on a terminal, plain lines in a log file. Rank 0 only."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import TextIO

from tqdm import tqdm

from loraprune_ds.report.records import CutRecord, EvaluationRecord, Record, StepRecord, cut_line
from loraprune_ds.units import format_bytes, format_clock, format_percent, format_perplexity

LATEST = 10  # steps that the time left is estimated from, because steps get faster with every cut
EVALUATED = {
    "dense": "dense model",
    "after_last_cut": "right after the last cut",
    "pruned": "exported model",
    "step": "held-out text",
}


class Progress:
    """Shows steps as they come, and each cut, evaluation and message on its own line.

    Args:
        steps: of the whole run.
        first: steps done before a resume.
        stream: default standard error. A terminal gets the live line, anything else plain lines.
        every_seconds: least time between two step lines that are not on a terminal.
    """

    def __init__(
        self,
        steps: int,
        *,
        first: int = 0,
        stream: TextIO | None = None,
        every_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = steps
        self._stream = sys.stderr if stream is None else stream
        self._every_seconds = every_seconds
        self._clock = clock
        self._started = clock()
        self._last_line = -math.inf  # when it was shown
        self._latest = deque[float](maxlen=LATEST)  # seconds of each step with its cut
        self._is_warm = False
        self._bar: tqdm | None = None
        if _can_show_live_line(self._stream):
            self._bar = tqdm(
                total=steps,
                initial=first,
                file=self._stream,
                bar_format="{desc}  {bar:10}",  # last, so that a narrow terminal loses the bar before the numbers
                dynamic_ncols=True,
                miniters=1,
            )
            self._bar.set_description_str(f"step {first}/{steps}")

    def write(self, record: Record) -> None:
        match record:
            case StepRecord():
                self._step(record)
            case CutRecord():
                if self._latest:
                    self._latest[-1] += record.seconds
                self.show(cut_line(record))
            case EvaluationRecord():
                self.show(evaluation_line(record))

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

    def _step(self, record: StepRecord) -> None:
        if self._is_warm:
            self._latest.append(record.seconds)
        self._is_warm = True  # the first step compiles, allocates and records
        if record.skipped:
            self.show(f"step {record.step}  skipped: the fp16 gradients overflowed, the loss scale goes down")
        if self._bar is not None:
            self._bar.set_description_str(self._step_line(record), refresh=False)
            self._bar.update(record.step - self._bar.n)
        elif self._clock() - self._last_line >= self._every_seconds or record.step == self.steps:
            self._last_line = self._clock()
            self.show(self._step_line(record))

    def _step_line(self, record: StepRecord) -> str:
        clock = format_clock(self._clock() - self._started)
        if self._latest:
            clock += f", {format_clock((self.steps - record.step) * fmean(self._latest))} left"
        return "  ".join(
            [
                f"step {record.step:>{len(str(self.steps))}}/{self.steps}",
                clock,
                f"loss {record.loss:.3f}",
                f"sparsity {format_percent(record.sparsity)}",
                f"{record.tokens_per_second:,.0f} tok/s",
                *([f"MFU {format_percent(record.mfu)}"] if record.mfu is not None else []),
                f"mem {format_bytes(max(record.resident_bytes))}"
                + (f" of {format_bytes(max(record.reserved_bytes))} reserved" if record.reserved_bytes else ""),
            ]
        )


def _can_show_live_line(stream: TextIO) -> bool:
    """Whether the stream is a terminal with a width. tqdm shows nothing where it is 0, as in some containers."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:  # an unknown width
        return True


def evaluation_line(evaluation: EvaluationRecord) -> str:
    return (
        f"step {evaluation.step}  perplexity {format_perplexity(evaluation.perplexity)} "
        f"({EVALUATED[evaluation.name]}, {evaluation.windows} windows)"
    )
