"""The events of a run as three kinds of records, metrics.jsonl with a line for each, and the names of results.

Reports, pictures and curves are made from these records.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TextIO

from pydantic import BeforeValidator, TypeAdapter

from loraprune_ds.errors import RankError, UserError, require
from loraprune_ds.files import json_text, write_text, writes_into
from loraprune_ds.units import format_bytes, format_percent

REPORT_FILE = "report.json"
METRICS_FILE = "metrics.jsonl"
KEPT_GROUPS_FILE = "kept_groups.json"
KEPT_GROUPS_PICTURE = "kept_groups.png"
TRAINING_PICTURE = "training.png"
EVALUATION_FILE = "evaluation.json"  # of `evaluate.after`, as `launch/evaluate.py --json` prints it
ANSWERS_PAGE = "answers.html"
MODEL_FOLDER = "model"
TENSORBOARD_FOLDER = "tensorboard"
# JSON has no NaN
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
EvaluationName = Literal["dense", "after_last_cut", "pruned", "size", "step"]


@dataclass(frozen=True)
class StepRecord:
    """Describes one optimizer step. The lists of bytes have an entry per rank."""

    step: int  # from 1
    loss: Number
    learning_rate: Number
    grad_norm: float | None
    sparsity: Number  # removed fraction of the decoder-layer linear parameters during this step
    tokens: int  # of the global batch, without padding
    seconds: Number  # wall time, excluding a cut or an evaluation after the step
    tokens_per_second: Number
    weight_bytes: list[int]  # frozen and LoRA
    resident_bytes: list[int]  # current memory, not its peak
    skipped: bool = False  # a loss scaler left out the update, because gradients were not finite
    reserved_bytes: list[int] = field(default_factory=list)  # held by the allocator. Empty on a CPU
    # of the step. 0 or empty: unknown
    peak_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class CutRecord:
    """Describes one cut, made right after the optimizer step of the same number."""

    step: int
    target: Number  # fraction of the decoder-layer linear parameters to remove
    reached: Number  # removed fraction
    removed_fraction: Number  # of all parameters of the model
    seconds: Number
    bytes_sent: int  # by all ranks together
    weight_bytes_before: list[int]  # per rank
    weight_bytes_after: list[int]
    # kept by each layer. Empty for a kind that the family lacks
    heads: list[int] = field(default_factory=list)
    query_heads: list[int] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    delta: list[int] = field(default_factory=list)
    cross_heads: list[int] = field(default_factory=list)


def cut_line(cut: CutRecord) -> str:
    """Describes a cut in one line, with the weights of the fullest rank."""
    reached = format_percent(cut.reached)
    target = format_percent(cut.target)
    sent = format_bytes(cut.bytes_sent)
    before = format_bytes(max(cut.weight_bytes_before))
    after = format_bytes(max(cut.weight_bytes_after))
    return (
        f"step {cut.step}  cut to {reached} (target {target}) in {cut.seconds:.2f} s, {sent} sent, "
        f"weights per rank {before} → {after}"
    )


@dataclass(frozen=True)
class EvaluationRecord:
    """Describes a measurement of held-out perplexity after `step` steps. Step 0 is before the training."""

    step: int
    name: EvaluationName  # "pruned" is the exported model, read back
    perplexity: Number
    tokens: int  # number of predictions
    windows: int


Record = StepRecord | CutRecord | EvaluationRecord
KINDS: dict[type[Record], str] = {
    StepRecord: "step",
    CutRecord: "cut",
    EvaluationRecord: "evaluation",
}
READERS: dict[str, TypeAdapter[Record]] = {
    kind: TypeAdapter(record) for record, kind in KINDS.items()
}


class Sink:
    """Takes records, for example metrics.jsonl. Some sinks show pictures, too."""

    def write(self, record: Record) -> None: ...

    def picture(self, path: Path) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class History:
    """Holds all records of a run so far, including those from before a resume."""

    steps: list[StepRecord] = field(default_factory=list)
    cuts: list[CutRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    def add(self, record: Record) -> None:
        match record:
            case StepRecord():
                self.steps.append(record)
            case CutRecord():
                self.cuts.append(record)
            case EvaluationRecord():
                self.evaluations.append(record)

    def perplexity(self, name: EvaluationName) -> float | None:
        """Returns the latest measurement with this name."""
        for evaluation in reversed(self.evaluations):
            if evaluation.name == name:
                return evaluation.perplexity
        return None


class Recorder:
    """Adds records to a history and passes them to the sinks, which only rank 0 has."""

    def __init__(self, history: History, sinks: Sequence[Sink]) -> None:
        self.history = history
        self.sinks = list(sinks)

    def write(self, record: Record) -> None:
        self.history.add(record)
        for sink in self.sinks:
            sink.write(record)

    def show_pictures(self, paths: Sequence[Path]) -> None:
        """Sends pictures to all sinks."""
        for sink in self.sinks:
            for path in paths:
                sink.picture(path)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class MetricsLog(Sink):
    """Appends a line of JSON per record: `{"kind": "step" | "cut" | "evaluation", ...}`. Each is flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with writes_into(path, RankError):
            self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        with writes_into(self.path, RankError):
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        with writes_into(self.path, RankError):
            self._file.close()


def write_history(path: Path, history: History) -> None:
    records = [*history.steps, *history.cuts, *history.evaluations]
    records.sort(key=lambda record: record.step)
    write_text(path, "".join(map(_line, records)))


def _line(record: Record) -> str:
    return json_text({"kind": KINDS[type(record)], **vars(record)})


def read_history(path: Path, last_step: int | None = None) -> History:
    """Reads the complete lines of a metrics.jsonl, or those up to `last_step`. Null numbers become NaN.

    A checkpoint at `last_step` has flushed its lines. A crash of the machine may have damaged later ones.

    Raises:
        UserError: the file does not exist, a line is damaged, or a step is missing. The message names file and line.
    """
    history = History()
    for record in _read_lines(path, last_step):
        if last_step is None or record.step <= last_step:
            history.add(record)
    steps = {record.step for record in history.steps}
    last = max(steps, default=0) if last_step is None else last_step
    missing = set(range(1, last + 1)) - steps
    if missing:
        raise UserError(f"{path} is damaged: the line of step {min(missing)} is missing")
    return history


def _read_lines(path: Path, last_step: int | None) -> list[Record]:
    """Reads the records of all complete lines, or at least of those up to `last_step`."""
    require(path.is_file(), f"{path} does not exist")
    text = path.read_text(encoding="utf-8", errors="replace")
    complete = text[: text.rfind("\n") + 1]  # a killed process may have left half a line after it
    records: list[Record] = []
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            kind = json.loads(line)["kind"]
            records.append(READERS[kind].validate_json(line))
        except (ValueError, KeyError, TypeError):
            if last_step is not None and records and records[-1].step >= last_step:
                break
            raise UserError(
                f"{path} line {number} is damaged: it must hold a step, cut or evaluation with all values"
            ) from None
    return records
