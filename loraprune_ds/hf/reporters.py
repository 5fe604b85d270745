"""Passes sparsity, cuts and bytes on to the reporters of a Trainer, in the step they happen.

A callback cannot add to the Trainer's own log lines, because its reporters have read them before. Each reporter is
called directly. Names begin with `pruning/`, next to the Trainer's `train/` and `eval/`.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from loraprune_ds.report.metrics import TensorBoardLog, scalars
from loraprune_ds.report.records import CutRecord, Record, Sink, cut_line
from loraprune_ds.report.reporters import SERVICES, ModuleLog

TRAINERS_OWN = ("train/loss", "train/learning_rate", "train/grad_norm")  # the Trainer logs them itself


def find_reporters(report_to: Iterable[str], output_dir: str, resumed_from: int | None) -> list[Sink]:
    """Makes the sinks of a Trainer's `report_to`, and one that prints a line for each cut."""
    sinks: list[Sink] = [CutPrinter()]
    if "tensorboard" in report_to:
        root = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(output_dir, "runs")
        sinks.append(TensorBoardRun(Path(root).expanduser() / "pruning", resumed_from))
    return sinks + [ModuleLog(name, _warn, curves) for name in SERVICES if name in report_to]


def _warn(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def curves(record: Record) -> dict[str, float]:
    own = {tag: value for tag, value in scalars(record).items() if tag not in TRAINERS_OWN}
    return {f"pruning/{tag.removeprefix('train/')}": value for tag, value in own.items()}


class CutPrinter:
    """Prints a line for each cut, above a Trainer's progress bar."""

    def write(self, record: Record) -> None:
        if isinstance(record, CutRecord):
            _warn(cut_line(record))

    def close(self) -> None: ...


class TensorBoardRun(TensorBoardLog):
    """Writes a separate TensorBoard run, because two writers in one run hide each other's points."""

    curves = staticmethod(curves)

    def write(self, record: Record) -> None:
        super().write(record)
        self._writer.flush()
