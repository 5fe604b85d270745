"""`state.json`, everything in a checkpoint except tensors."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.layout import FORMAT, CheckpointMismatch, check_format, numbered, step_folder
from loraprune_ds.errors import UserError

STATE_FILE = "state.json"


@dataclass(frozen=True)
class ShapeSource:
    """Names the folder of the frozen weights: `shape-K` next to the steps, or the source, of which slices are read."""

    folder: str  # the name of the shape folder, or the path of the source
    digest: str  # of the shape's manifest, or `load.source_digest`
    is_source: bool


@dataclass(frozen=True)
class RunTotals:
    tokens: int = 0  # read in all steps
    perplexity_dense: float | None = None  # held-out, before the first step
    perplexity: float | None = None  # held-out, at this step


@dataclass(frozen=True)
class RunState:
    """A run after `step` optimizer steps, independent of the number of ranks."""

    step: int
    totals: RunTotals
    adam_step: int  # updates of Adam, fewer than `step` if fp16 steps were skipped
    schedule: dict[str, Any]  # state of the learning-rate schedule
    loss_scale: dict[str, Any]  # state of fp16's loss scaler, otherwise empty
    kept: list[list[list[int]]]  # by layer and kind, as indices into the dense model
    updates_since_cut: int  # of the scores
    cuts: int  # made so far, the number of the shape
    shape: ShapeSource
    resumed_from: list[int]  # steps of earlier resumes
    config: dict[str, Any]
    moment_tokens: float = 0.0  # the tokens that the input moments are sums over
    format: int = field(default=FORMAT)


def state_text(state: RunState) -> str:
    return json.dumps(asdict(state)) + "\n"


def read_state(folder: Path) -> RunState:
    """Reads `state.json`. Raises UserError if it is damaged, and CheckpointMismatch for another format."""
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
    """Reads the newest state under `root` without verifying the checkpoint, to see whose run it is."""
    for number in reversed(numbered(root, "step")):
        try:
            return read_state(step_folder(root, number))
        except CheckpointMismatch:
            raise
        except UserError:
            continue
    return None
