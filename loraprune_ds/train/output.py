"""The folder of a run: whether it may be used, and what lies in it."""

from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.train.files import write_text
from loraprune_ds.train.status import Status, read_status, write_status

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"


def check_output(config: RunConfig) -> bool:
    """Looks at `output_dir` without touching it. True: it holds this very run, finished.

    Raises:
        UserError: it holds an unfinished run, another run, or something that is not a run.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is not a folder")
    status = read_status(folder)
    if status is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output_dir {folder} is not empty and holds no run; choose another output_dir")
        return False
    if different := _first_difference(_read_config(folder), config.to_dict(), ""):
        raise UserError(f"output_dir {folder} holds another run ({different} differs); choose another output_dir")
    if status.state != "finished":
        where = f"{status.state} at step {status.step} of {status.steps}"
        raise UserError(
            f"output_dir {folder} holds an unfinished run ({where}); remove it or choose another output_dir"
        )
    return True


def create_output(config: RunConfig) -> Path:
    """Makes the folder and writes the resolved config into it.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    return folder


class RunStatus:
    """Keeps status.json true: running while open, failed with its one-line error if an exception passes through."""

    def __init__(self, folder: Path, steps: int, *, writes: bool) -> None:
        self.folder = folder
        self.steps = steps
        self.step = 0
        self._writes = writes

    def __enter__(self) -> "RunStatus":
        self.update(0)
        return self

    def update(self, step: int) -> None:
        self.step = step
        self._write(Status("running", step, self.steps))

    def finish(self) -> None:
        self._write(Status("finished", self.step, self.steps))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            line = " ".join(str(error).split()) or type(error).__name__
            self._write(Status("failed", self.step, self.steps, error=line))

    def _write(self, status: Status) -> None:
        if self._writes:
            write_status(self.folder, status)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        raise UserError(f"{path} is missing or damaged; remove {folder} or choose another output_dir") from None
    return raw if isinstance(raw, dict) else {}


def _first_difference(old: dict[str, Any], new: dict[str, Any], prefix: str) -> str | None:
    """The first key whose values differ; how a run is shown is not part of what it is."""
    for key in [k for k in (*new, *(k for k in old if k not in new)) if prefix + k not in ("logging", "output_dir")]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            if found := _first_difference(before, after, f"{prefix}{key}."):
                return found
        elif before != after:
            return prefix + key
    return None
