"""The names in a run's folder, and status.json."""

import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from loraprune_ds.checkpoint.layout import FORMAT, check_format
from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json, write_json

STATUS_FILE = "status.json"
REPORT_FILE = "report.json"
MODEL_FOLDER = "model"
CHECKPOINTS_FOLDER = "checkpoints"
KEPT_GROUPS_FILE = "kept_groups.json"
KEPT_GROUPS_PICTURE = "kept_groups.png"
TRAINING_PICTURE = "training.png"
ROUTER_PICTURE = "router_load.png"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TEACHER_FOLDER = "teacher"

State = Literal["running", "stopped", "finished", "failed"]
KINDS = {"step": int, "steps": int, "error": str | None, "updated": str, "mark": str, "job": str | None}


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
    """Reads the status of the run in this folder, if there is a run.

    Raises:
        UserError: status.json is damaged, or as CheckpointMismatch, of another format.
    """
    path = folder / STATUS_FILE
    if not path.exists():
        return None
    raw = read_json(path)
    if raw.get("state") not in get_args(State):
        raise UserError(f"{path} is damaged: state is {raw.get('state')!r}, not one of {', '.join(get_args(State))}")
    check_format(raw.get("format", "4 or older"), path)
    for key, kind in KINDS.items():
        if not isinstance(raw.get(key), kind):
            raise UserError(f"{path} is damaged: {key} is {raw.get(key)!r}")
    values: dict[str, Any] = {key: raw.get(key) for key in ("state", *KINDS)}
    return Status(**values)


def describe_method(report: dict[str, Any]) -> str:
    """Names criterion and ranking of the run that wrote this report.json."""
    prune = report["config"]["prune"]
    return f"{prune['criterion']}, {prune['ranking']}"
