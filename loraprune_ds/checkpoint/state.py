"""The part of a checkpoint that is no tensor, as JSON."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.layout import FORMAT, CheckpointMismatch, check_format, numbered, step_folder
from loraprune_ds.errors import UserError

STATE_FILE = "state.json"


@dataclass(frozen=True)
class ShapeSource:
    """Names the place of the frozen weights: `shape-K` beside the steps, or the source, read by its kept groups.

    Attributes:
        folder: name of the shape folder, or the path of the source.
        digest: checksum of the shape's manifest, or `load.source_digest` of the source.
        is_source: the weights are those of the model that the run started from, or slices of them.
    """

    folder: str
    digest: str
    is_source: bool


@dataclass(frozen=True)
class RunTotals:
    """Counts what a run has read and measured.

    Attributes:
        tokens: of all its steps.
        perplexity_dense: held-out, before the first step.
        perplexity: held-out, at this very step.
    """

    tokens: int = 0
    perplexity_dense: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class RunState:
    """Describes a run after `step` optimizer steps, independent of the number of ranks.

    Attributes:
        totals: tokens read, perplexities measured.
        adam_step: updates that Adam has made. Fewer than `step` if fp16 steps were skipped.
        schedule: state of the learning-rate schedule.
        loss_scale: state of fp16's loss scaler, empty otherwise.
        kept: per layer, the kept groups of each of the family's kinds, as indices into the dense model.
        updates_since_cut: scores since the last cut.
        cuts: made so far; the number of the shape.
        moment_tokens: tokens that the input moments are sums over; 0 if there are none.
        resumed_from: steps at which the run was taken up before.
        config: the resolved run config.
    """

    step: int
    totals: RunTotals
    adam_step: int
    schedule: dict[str, Any]
    loss_scale: dict[str, Any]
    kept: list[list[list[int]]]
    updates_since_cut: int
    cuts: int
    shape: ShapeSource
    resumed_from: list[int]
    config: dict[str, Any]
    moment_tokens: float = 0.0
    format: int = field(default=FORMAT)


def state_text(state: RunState) -> str:
    """Returns the text of `state.json`. It has no line breaks: a large model keeps a million groups."""
    return json.dumps(asdict(state)) + "\n"


def read_state(folder: Path) -> RunState:
    """Reads `state.json`.

    Raises:
        UserError: it is missing or damaged.
        CheckpointMismatch: it is of another format.
    """
    path = folder / STATE_FILE
    try:
        raw = json.loads(path.read_text())
        version = int(raw["format"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is missing or damaged") from None
    check_format(version, path)
    try:
        raw["totals"] = RunTotals(**raw["totals"])
        raw["shape"] = ShapeSource(**raw["shape"])
        raw["kept"] = [[list(groups) for groups in layer] for layer in raw["kept"]]
        return RunState(**raw)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged: a field is missing or unknown") from None


def newest_state(root: Path) -> RunState | None:
    """Reads the newest state under `root`, unverified. That is enough to see whose run it is.

    Raises:
        CheckpointMismatch: it is of another format.
    """
    for number in reversed(numbered(root, "step")):
        try:
            return read_state(step_folder(root, number))
        except CheckpointMismatch:
            raise
        except UserError:
            continue
    return None
