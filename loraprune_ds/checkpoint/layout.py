"""The files in a run's folder: their names, formats and seals, and the contents of status.json and manifest.json."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar
from uuid import uuid4

from pydantic import ConfigDict, TypeAdapter, ValidationError

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import MANIFEST, JsonObject, flush, write_json

# The format of all that a run or a callback resumes from. From the release of 0.2.0 every later version reads it, and a
# change that old folders lack increases it.
FORMAT = 10
# by the last format that it reads
READERS = {4: "commit 3c6d113b", 6: "commit b3c6aacb", 9: "commit 91eae51f"}

STATUS_FILE = "status.json"
CHECKPOINTS_FOLDER = "checkpoints"
PRUNING_FOLDER = "pruning"  # our step in the checkpoint of another trainer
# In a step.
RESUME_FOLDER = "resume"
REFITS = "refit-*.safetensors"
TRAINED = "trained-*.safetensors"
SCORES_FILE = "scores.safetensors"
PASSES = "passes-{:05d}.pt"  # of a rank
PASSES_OF_ALL = "passes-*.pt"

State = Literal["running", "stopped", "finished", "failed"]
T = TypeVar("T")
NO_MORE = ConfigDict(extra="forbid")  # fields


class CheckpointMismatch(UserError):
    """An undamaged checkpoint that this start cannot use. A run from step 0 would remove it at its first save."""


def recorded_config(raw: JsonObject, path: Path) -> RunConfig:
    """Reads the config in `path`. Raises CheckpointMismatch if another version with other settings wrote it."""
    try:
        return config_from_dict(raw)
    except UserError as error:
        raise CheckpointMismatch(f"{path} has settings of another version: {error}") from None


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def layer_file(part: str, layer: int) -> str:
    """Names the file of a layer's `part`: lora, refit, trained or adam."""
    return f"{part}-{layer:05d}.safetensors"


def numbered(root: Path, kind: str) -> list[int]:
    """Returns the numbers of the folders `{kind}-{number}`, ascending."""
    numbers: list[int] = []
    for path in root.glob(f"{kind}-*"):
        number = path.name.removeprefix(f"{kind}-")
        if path.is_dir() and number.isdigit():
            numbers.append(int(number))
    return sorted(numbers)


@dataclass(frozen=True)
class Status:
    """The state of a run after `step` of `steps` optimizer steps. A killed run stays "running"."""

    state: State
    step: int
    steps: int
    error: str | None = None
    updated: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    mark: str = field(default_factory=lambda: uuid4().hex[:8])  # tells one start from another
    # slurm/job.sh compares it
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    format: int = FORMAT

    def __str__(self) -> str:
        return f"{self.state} at step {self.step} of {self.steps}"


def write_status(folder: Path, status: Status) -> None:
    write_json(folder / STATUS_FILE, status)


def read_status(folder: Path) -> Status | None:
    """Reads the status of the folder's run, if any. Raises UserError, and CheckpointMismatch for another format."""
    path = folder / STATUS_FILE
    return read_record(path, Status) if path.exists() else None


def read_record(path: Path, kind: type[T]) -> T:
    """Reads a file that holds a dataclass, and checks every value.

    Raises UserError if it is missing or damaged, and CheckpointMismatch for another format.
    """
    with _damage_in_one_line(path):
        text = path.read_text(encoding="utf-8")
        version = int(json.loads(text).get("format", 4))
        if version != FORMAT:
            reader = next((READERS[last] for last in READERS if version <= last), "another version")
            raise CheckpointMismatch(
                f"{path} has format {version}, and this version reads {FORMAT}; {reader} can finish or export it"
            )
        return TypeAdapter(kind).validate_json(text, strict=True)


@contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise UserError(f"{path} is missing or cannot be read") from None
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is damaged: {field_name}: {first['msg']}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def newest_usable(
    root: Path,
    steps: list[int],
    read: Callable[[Path], T],
    warn: Callable[[str], object] = lambda line: None,
) -> T | None:
    """Reads the last of the `steps` that is not damaged, and warns of those after it. Raises CheckpointMismatch."""
    for step in reversed(steps):
        try:
            return read(step_folder(root, step))
        except CheckpointMismatch:
            raise
        except UserError as error:
            warn(f"checkpoint step-{step} cannot be used: {error}")
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> JsonObject:
    """Flushes a file to the disk and returns its entry for the manifest."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: dict[str, JsonObject]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    flush(path)


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th file of a folder against its manifest, so ranks can share the reading."""
    manifest = folder / MANIFEST
    with _damage_in_one_line(manifest):
        entries = json.loads(manifest.read_text())["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in entries.items()}
        digests = {name: str(entry["sha256"]) for name, entry in entries.items()}
    for i, name in enumerate(sorted(sizes)):
        path = folder / name
        require(path.is_file(), f"{path} is missing")
        if i % parts != part:
            continue
        if path.stat().st_size != sizes[name] or sha256(path) != digests[name]:
            raise UserError(f"{path} is damaged: its checksum differs from {MANIFEST}")
