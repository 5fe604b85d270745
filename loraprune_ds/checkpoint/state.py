"""The contents of a step's state.json, the same for a run and for another trainer.

README.md in this folder describes a step's files.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from loraprune_ds.checkpoint import layout
from loraprune_ds.config_types import Bits, EngineName
from loraprune_ds.files import STATE_FILE, JsonObject


@dataclass(frozen=True)
class Totals:
    tokens: int = 0  # read in all steps
    perplexity_dense: float | None = None  # held-out, before the first step
    perplexity: float | None = None  # held-out, at this step


@dataclass(frozen=True)
class RunData:
    """Identifies what a run tunes on and measures."""

    samples: str  # digest
    held_out: str  # digest of the text
    # of data sets of the hub, by their sections of the config
    commits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What a training began with. It never changes.

    Attributes:
        config: a run's settings. A callback's has those alone that its results need.
        steps: of the schedule.
        query_heads: some leave without their key-value head.
        groups: of each kind in each layer of the dense model.
        folder: of the dense model. Weights that no refit changed are its slices. None: no folder has the same weights.
        digest: of that folder (`load.source_digest`).
        bits: how bitsandbytes quantised the dense model, which the folder has before that or after.
        data: None if another trainer's loop trains.
    """

    config: JsonObject
    steps: int
    seed: int
    query_heads: bool
    groups: list[list[int]]
    folder: str | None = None
    digest: str | None = None
    data: RunData | None = None
    bits: Bits | None = None


@dataclass(frozen=True)
class State:
    """A training under pruning after `step` optimizer steps, as far as its results need it.

    Attributes:
        kept: kept groups by layer and kind, as indices into the dense model.
        engine: that trains (engines.py).
        scaling: lora_alpha / r of most linears. `scalings` has the others, as "{layer}.{linear}".
        formats: storage formats of linears that are not stored in the model's dtype, by the same names.
        trained: other tensors than LoRA that train, by the names of the text class.
        asked: fraction of the linear parameters to remove.
        resumed_from: steps of earlier resumes.
        accelerator: the name of the ranks' device.
        peak_bytes: the most memory that each rank has held since its start.
    """

    step: int
    origin: Origin
    kept: list[list[list[int]]]
    engine: str
    world_size: int
    scaling: float
    scalings: dict[str, float]
    formats: dict[str, str]
    trained: list[str]
    asked: float
    totals: Totals
    resumed_from: list[int]
    accelerator: str
    peak_bytes: list[int]
    format: int = layout.FORMAT
    __pydantic_config__ = layout.NO_MORE


@dataclass(frozen=True)
class ResumeState:
    """What only a resume needs.

    Attributes:
        optimizer: its kind (engine/optimizer_state.py). Its states are in the files of what trains.
        groups: its param_groups without parameters.
        schedule: state of the learning-rate schedule, of a run or a Trainer.
        loss_scale: state of fp16's loss scaler, otherwise empty.
        updates_since_cut: of the scores.
    """

    optimizer: str
    updates_since_cut: int
    groups: list[JsonObject] = field(default_factory=list)
    schedule: JsonObject = field(default_factory=dict)
    loss_scale: JsonObject = field(default_factory=dict)
    format: int = layout.FORMAT
    __pydantic_config__ = layout.NO_MORE


def read_state(folder: Path) -> State:
    """Reads the state in a step's folder like `layout.read_record`."""
    path = folder / STATE_FILE
    state = layout.read_record(path, State)
    if state.engine not in get_args(EngineName):
        raise layout.CheckpointMismatch(
            f"{path} is of the engine {state.engine!r}, which a later version knows"
        )
    return state


def read_resume_state(folder: Path) -> ResumeState:
    """Reads the counters in a step's folder `resume` like `layout.read_record`."""
    return layout.read_record(folder / STATE_FILE, ResumeState)


def newest_state(root: Path) -> State | None:
    """Reads the newest state under `root` without verifying the checkpoint, to see whose run it is."""
    return layout.newest_usable(root, layout.numbered(root, "step"), read_state)
