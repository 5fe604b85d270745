"""What happens in a run, as three kinds of records. Everything a person looks at is made from them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

EvaluationName = Literal["dense", "after_last_cut", "pruned", "step"]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; `step` counts from 1.

    Attributes:
        sparsity: fraction of the decoder-layer linear parameters that is gone during this step.
        tokens: of this step's global batch.
        seconds: wall time of this step, a cut or an evaluation after it not included.
        weight_bytes: of the weights each rank holds, frozen and LoRA: (world_size,).
        resident_bytes: memory each rank uses now, not its peak: (world_size,).
        skipped: the gradients overflowed in fp16 and the weights did not change.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    sparsity: float
    tokens: int
    seconds: float
    tokens_per_second: float
    weight_bytes: list[int]
    resident_bytes: list[int]
    skipped: bool = False


@dataclass(frozen=True)
class CutRecord:
    """One cut, made right after the optimizer step of the same number.

    Attributes:
        target: fraction of the decoder-layer linear parameters that should be gone.
        reached: the fraction that is gone.
        removed_fraction: of all parameters of the model.
        bytes_sent: by all ranks together.
        weight_bytes_before, weight_bytes_after: (world_size,).
        heads, channels: counts every layer keeps, heads in key-value heads: (num_layers,).
    """

    step: int
    target: float
    reached: float
    removed_fraction: float
    seconds: float
    bytes_sent: int
    weight_bytes_before: list[int]
    weight_bytes_after: list[int]
    heads: list[int]
    channels: list[int]


@dataclass(frozen=True)
class EvaluationRecord:
    """Held-out perplexity after `step` steps (0: before training); `tokens` are the predicted ones.

    `name`: the dense model, the model right after the last cut, the exported model reloaded ("pruned"), or some step.
    """

    step: int
    name: EvaluationName
    perplexity: float
    tokens: int
    windows: int


Record = StepRecord | CutRecord | EvaluationRecord
KINDS: dict[str, type[Record]] = {"step": StepRecord, "cut": CutRecord, "evaluation": EvaluationRecord}


class Sink(Protocol):
    """Where records go: metrics.jsonl, TensorBoard, the progress display."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class History:
    """All records of a run so far, also those of earlier processes when it was resumed."""

    steps: list[StepRecord] = field(default_factory=list)
    cuts: list[CutRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)

    def perplexity(self, name: EvaluationName) -> float | None:
        """The latest one of that name."""
        return next((e.perplexity for e in reversed(self.evaluations) if e.name == name), None)


def history_from(metrics: Iterable[dict[str, Any]]) -> History:
    """The lines of metrics.jsonl (`metrics.read_metrics`) as records; null numbers become NaN again."""
    history = History()
    lists: dict[str, list[Any]] = {"step": history.steps, "cut": history.cuts, "evaluation": history.evaluations}
    for line in metrics:
        record = KINDS[line["kind"]]
        values: dict[str, Any] = {f.name: line[f.name] for f in fields(record)}
        lost: dict[str, Any] = {f.name: math.nan for f in fields(record) if f.type is float and values[f.name] is None}
        lists[line["kind"]].append(record(**values | lost))
    return history
