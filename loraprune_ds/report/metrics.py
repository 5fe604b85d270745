"""Writes and reads metrics.jsonl, which has a line for every record of a run."""

import json
import os
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, TextIO

from loraprune_ds.errors import UserError
from loraprune_ds.files import finite, write_text
from loraprune_ds.report.records import RECORD_KINDS, History, Record

KIND_OF = {record: kind for kind, record in RECORD_KINDS.items()}


class MetricsLog:
    """Appends a line of JSON per record: `{"kind": "step" | "cut" | "evaluation", ...}`. Each is flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            write_text(path, _complete_lines(path))  # else the next record would join the half line of a killed process
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def truncate(self) -> None:
        """Drops all lines, which may be damaged."""
        self._replace("")

    def truncate_to(self, step: int) -> None:
        """Drops the lines of later steps. A run that resumes from the checkpoint of `step` writes them again."""
        self._replace("".join(json.dumps(line) + "\n" for line in read_metrics(self.path, step)))

    def _replace(self, text: str) -> None:
        write_text(self.path, text)
        self._file.close()  # it still points to the file that was replaced
        self._file = self.path.open("a", encoding="utf-8")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_history(path: Path, history: History) -> None:
    records = sorted((*history.steps, *history.cuts, *history.evaluations), key=lambda record: record.step)
    write_text(path, "".join(map(_line, records)))


def _line(record: Record) -> str:
    return json.dumps(finite({"kind": KIND_OF[type(record)], **asdict(record)}), allow_nan=False) + "\n"


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """Reads the complete lines of a metrics.jsonl, or those up to `last_step`.

    A checkpoint at `last_step` has flushed its lines. After them a crash of the machine may have left anything.

    Raises:
        UserError: the file does not exist, a line is damaged, or a step is missing. The message names the place.
    """
    try:
        lines = _complete_lines(path).splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(_parse_line(line, f"{path} line {number}"))
        except UserError:
            if last_step is None or not values or values[-1]["step"] < last_step:
                raise
            break
    values = [value for value in values if last_step is None or value["step"] <= last_step]
    steps = {value["step"] for value in values if value["kind"] == "step"}
    last = max(steps, default=0) if last_step is None else last_step
    if missing := set(range(1, last + 1)) - steps:
        raise UserError(f"{path} is damaged: the line of step {min(missing)} is missing")
    return values


def _complete_lines(path: Path) -> str:
    """Reads the text up to its last newline, after which a killed process may have left half a line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1]


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        raise UserError(f"{where} is not valid JSON") from None
    if not isinstance(value, dict) or value.get("kind") not in RECORD_KINDS or not isinstance(value.get("step"), int):
        raise UserError(f"{where} is damaged: it must hold an object with kind and step")
    # Fields with a default are newer than the first versions.
    known = fields(RECORD_KINDS[value["kind"]])
    required = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
    if missing := required - value.keys():
        raise UserError(f"{where} is damaged: {', '.join(sorted(missing))} missing")
    return value
