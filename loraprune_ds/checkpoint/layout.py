"""The files in a run's folder: their names, and the contents of status.json, state.json and manifest.json."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import flush, read_json, write_json

# The format of all that a run or a callback resumes from. A change that old folders lack increases it.
FORMAT = 6
READERS = dict.fromkeys("1234", "3c6d113b") | {"5": "b3c6aacb"}  # the last commit that reads a format

STATUS_FILE = "status.json"
REPORT_FILE = "report.json"
METRICS_FILE = "metrics.jsonl"
KEPT_GROUPS_FILE = "kept_groups.json"
KEPT_GROUPS_PICTURE = "kept_groups.png"
SHELF_PICTURE = "shelf.png"  # only with several sizes
TRAINING_PICTURE = "training.png"
EVALUATION_FILE = "evaluation.json"  # of `evaluate.after`, as `launch/evaluate.py --json` prints it
ANSWERS_PAGE = "answers.html"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
TENSORBOARD_FOLDER = "tensorboard"
# In a checkpoint.
STATE_FILE = "state.json"
MANIFEST = "manifest.json"
SCORES_FILE = "scores.safetensors"

State = Literal["running", "stopped", "finished", "failed"]
STATUS_TYPES = {"step": int, "steps": int, "error": str | None, "updated": str, "mark": str, "job": str | None}


class CheckpointMismatch(UserError):
    """An undamaged checkpoint that this start cannot use. A run from step 0 would remove it at its first save."""


def check_format(version: object, path: Path) -> None:
    if version != FORMAT:
        raise CheckpointMismatch(f"{path} has format {version}, {_reader(version)}; this version reads format {FORMAT}")


def recorded_config(raw: dict[str, Any], path: Path) -> RunConfig:
    """Reads the config in `path`. Raises CheckpointMismatch if another version with other settings wrote it."""
    try:
        return config_from_dict(raw)
    except UserError as error:
        raise CheckpointMismatch(f"{path} has format {FORMAT} of other settings, {_reader(FORMAT)}: {error}") from None


def _reader(version: object) -> str:
    reader = READERS.get(str(version))
    return f"which commit {reader} reads" if reader else "which another version reads"


def export_folder(sizes: Mapping[int, str], step: int) -> str:
    """Names the folder of the model that a run exports after a step. `sizes`: last step -> name."""
    return MODEL_FOLDER if step == max(sizes) else f"{MODEL_FOLDER}-{sizes[step].replace(' ', '')}"


def exported_sizes(folder: Path, sizes: Mapping[int, str]) -> dict[int, str]:
    """Returns the sizes whose models are in a run's folder, and the last one, which is the run's own model."""
    return {n: size for n, size in sizes.items() if n == max(sizes) or (folder / export_folder(sizes, n)).is_dir()}


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def moments_file(layer: int) -> str:
    return f"moments-{layer:05d}.safetensors"


def numbered(root: Path, kind: str) -> list[int]:
    """Returns the numbers of the folders `{kind}-{number}`, ascending."""
    numbers = [path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*") if path.is_dir()]
    return sorted(int(number) for number in numbers if number.isdigit())


@dataclass(frozen=True)
class Status:
    """The state of a run after `step` of `steps` optimizer steps. A killed run stays "running"."""

    state: State
    step: int
    steps: int
    error: str | None = None
    updated: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    mark: str = field(default_factory=lambda: uuid4().hex[:8])  # tells one start from another
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))  # slurm/job.sh compares it
    format: int = FORMAT

    def __str__(self) -> str:
        return f"{self.state} at step {self.step} of {self.steps}"


def write_status(folder: Path, status: Status) -> None:
    write_json(folder / STATUS_FILE, asdict(status))


def read_status(folder: Path) -> Status | None:
    """Reads the status of the folder's run, if any. Raises UserError, and CheckpointMismatch for another format."""
    path = folder / STATUS_FILE
    if not path.exists():
        return None
    raw = read_json(path)
    if raw.get("state") not in get_args(State):
        raise UserError(f"{path} is damaged: state is {raw.get('state')!r}, not one of {', '.join(get_args(State))}")
    check_format(raw.get("format", 4), path)
    for key, kind in STATUS_TYPES.items():
        require(isinstance(raw.get(key), kind), f"{path} is damaged: {key} is {raw.get(key)!r}")
    values: dict[str, Any] = {key: raw.get(key) for key in ("state", *STATUS_TYPES)}
    return Status(**values)


def describe_method(report: dict[str, Any]) -> str:
    """Names criterion and ranking of the run that wrote this report.json."""
    prune = report["config"]["prune"]
    return f"{prune['criterion']}, {prune['ranking']}"


@dataclass(frozen=True)
class ShapeSource:
    """Names the folder of the frozen weights: `shape-K` next to the steps, or the source, to read slices from."""

    folder: str  # the name of the shape folder, or the path of the source
    digest: str  # digest of the manifest, or `load.source_digest`
    is_source: bool


@dataclass(frozen=True)
class RunTotals:
    tokens: int = 0  # read in all steps
    perplexity_dense: float | None = None  # held-out, before the first step
    perplexity: float | None = None  # held-out, at this step


@dataclass(frozen=True)
class RunData:
    """Identifies what a run tunes on and measures."""

    steps: int  # of the run
    samples: str  # digest
    held_out: str  # digest of the text
    commits: dict[str, str] = field(default_factory=dict)  # of data sets of the hub, by their sections of the config


@dataclass(frozen=True)
class RunState:
    """A run after `step` optimizer steps, independent of the number of ranks."""

    step: int
    totals: RunTotals
    adam_step: int  # updates of Adam, fewer than `step` if fp16 steps were skipped
    schedule: dict[str, Any]  # state of the learning-rate schedule
    loss_scale: dict[str, Any]  # state of fp16's loss scaler, otherwise empty
    kept: list[list[list[int]]]  # kept groups by layer and kind, as indices into the dense model
    updates_since_cut: int  # updates of the scores
    cuts: int  # cuts so far, which is also the number of the shape
    shape: ShapeSource
    resumed_from: list[int]  # steps of earlier resumes
    config: dict[str, Any]
    data: RunData
    asked: float  # fraction of the linear parameters to remove, up to the end or to the next size
    moment_tokens: float = 0.0  # the number of tokens in the sums of the input moments
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
        raw["totals"], raw["data"] = RunTotals(**raw["totals"]), RunData(**raw["data"])
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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk and returns its entry for the manifest."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    flush(path)


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th file of a folder against its manifest, so ranks can share the reading."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
        files = sorted((name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / MANIFEST} is missing or damaged") from None
    for i, (name, size, digest) in enumerate(files):
        path = folder / name
        require(path.is_file(), f"{path} is missing")
        if i % parts == part and (path.stat().st_size != size or sha256(path) != digest):
            raise UserError(f"{path} is damaged: its checksum differs from {MANIFEST}")
