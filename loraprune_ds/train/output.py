"""Decides if a run may use its output folder, and makes it."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from loraprune_ds.checkpoint.layout import (
    CHECKPOINTS_FOLDER,
    STATUS_FILE,
    CheckpointMismatch,
    Status,
    newest_state,
    read_status,
)
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict, forget_removed, merge
from loraprune_ds.errors import UserError
from loraprune_ds.files import remove_leftovers, write_text

if TYPE_CHECKING:  # a start that fails on its config need not wait for DeepSpeed's imports
    from loraprune_ds.zero.comm import Communicator

CONFIG_FILE = "config.yaml"
NOT_THE_RUN = ("logging", "output_dir")  # a run shown otherwise or elsewhere is the same run
SHARED_WAIT = 60.0  # seconds; a network file system may remember for half a minute that a file was missing
# A resumed run may also change how it saves and how it splits a global batch.
MAY_DIFFER = (*NOT_THE_RUN, "checkpoint", "deepspeed", "train.micro_batch_size")


@dataclass(frozen=True)
class Start:
    """Says how to begin."""

    kind: Literal["fresh", "finished", "resume"]
    path: Path | None = None  # that `--resume` named, resolved. None with `auto`


def resumed_config(given: dict[str, Any], resume: str | None) -> RunConfig:
    """Returns the config of a run that resumes: settings that are not given come from the run itself.

    A default that changes later changes no run. A fresh start has the given settings and the defaults.

    Args:
        given: the keys that the YAML and `--set` give.
        resume: the value of `--resume`: None, "auto" or a path.

    Raises:
        UserError: as `config_from_dict`. CheckpointMismatch if the run is of another format.
    """
    output_dir = given.get("output_dir")
    with _told_if_unreadable(output_dir):
        saved = _find_saved(output_dir, resume)
    if saved is not None:
        with suppress(UserError):  # what does not go together is another run, which `inspect_output` refuses
            return config_from_dict(merge(forget_removed(saved), given))
    return config_from_dict(given)


def _find_saved(output_dir: Any, resume: str | None) -> dict[str, Any] | None:
    """Finds the config of the run that resumes, in its folder or, if a crash has lost it there, in a checkpoint."""
    folders = [Path(output_dir).expanduser()] if isinstance(output_dir, str) else []
    if resume is not None and resume != "auto":
        folders += [path := Path(resume).resolve(), *path.parents[:2]]  # a run, its checkpoints, or one of them
    for folder in folders:
        if found := _read_run_config(folder):
            return found
    states = (newest_state(folder / CHECKPOINTS_FOLDER) for folder in folders)
    return next((state.config for state in states if state is not None), None)


def inspect_output(config: RunConfig, resume: str | None) -> Start:
    """Looks at `output_dir` without touching it and decides how to begin.

    Args:
        resume: the value of `--resume`: None, "auto" or a path.

    Raises:
        UserError: the folder holds another run, no run, or an unfinished one without `--resume`. Or the path to resume
            from does not exist, or leads elsewhere though `output_dir` holds a run. Or the folder is not accessible.
    """
    folder = Path(config.output_dir)
    with _told_if_unreadable(folder):
        _check_access(folder, os.R_OK | os.X_OK, "readable")
        path = None if resume is None or resume == "auto" else Path(resume).resolve()
        if path is not None and not path.is_dir():
            raise UserError(f"--resume {resume}: no such folder")
        status = _read_status(folder, resume)
        if status is not None and status.state == "finished":
            _check_same_run(folder, config.to_dict(), NOT_THE_RUN)
            return Start("finished")
        _check_access(folder, os.W_OK, "writable")
        if resume is not None:
            _check_resume(folder, config.to_dict(), path)
            return Start("resume", path)
        if status is not None:
            raise UserError(
                f"output_dir {folder} holds an unfinished run ({status}); go on with --resume auto, or choose another"
            )
        _refuse_foreign(folder)
        return Start("fresh")


@contextmanager
def _told_if_unreadable(folder: object) -> Iterator[None]:
    """Turns a name that is too long, or a disk that does not answer, into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be read: {error.strerror}") from None


def _read_status(folder: Path, resume: str | None) -> Status | None:
    """Reads status.json. A crash of the machine can leave it empty, but the checkpoints are enough for a resume."""
    try:
        return read_status(folder)
    except CheckpointMismatch:
        raise
    except UserError as error:
        if resume is None:
            raise UserError(f"{error}; go on with --resume auto, or choose another output_dir") from None
        return None


def _check_access(folder: Path, mode: int, what: str) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"output_dir {folder}: {there} is not a folder")
    if not os.access(there, mode):
        raise UserError(f"output_dir {folder}: {there} is not {what}")


def _refuse_foreign(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output_dir {folder} is not empty and holds no run; choose another output_dir")


def _check_resume(folder: Path, settings: dict[str, Any], path: Path | None) -> None:
    holds_run = any((folder / name).exists() for name in (CONFIG_FILE, STATUS_FILE, CHECKPOINTS_FOLDER))
    if not holds_run:
        _refuse_foreign(folder)
    elif path is not None and not path.is_relative_to(folder.resolve()):
        raise UserError(
            f"output_dir {folder} holds a run already, so it cannot take up --resume {path}; "
            "go on with --resume auto, or choose another output_dir"
        )
    newest_state(folder / CHECKPOINTS_FOLDER)  # another format has its own error line
    if _read_run_config(folder):  # otherwise a crash of the machine has lost it, and every checkpoint holds it too
        _check_same_run(folder, settings, MAY_DIFFER)


def _check_same_run(folder: Path, settings: dict[str, Any], ignored: Sequence[str]) -> None:
    raw = _read_run_config(folder)
    if raw is None:
        raise UserError(f"{folder / CONFIG_FILE} is missing or damaged; remove {folder} or choose another output_dir")
    if different := differences(raw, settings, ignored):
        raise UserError(
            f"output_dir {folder} holds another run ({', '.join(different)} differs); choose another output_dir"
        )


def _read_run_config(folder: Path) -> dict[str, Any] | None:
    """Reads the resolved config of the run in `folder`. None if it is missing or damaged."""
    try:
        raw = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return raw if isinstance(raw, dict) and raw else None


def differences(old: dict[str, Any], new: dict[str, Any], ignored: Sequence[str]) -> list[str]:
    """Finds the dotted keys whose values differ. Sections and keys in `ignored` do not count.

    Keys that the config of an earlier version lacks have their defaults there. Raises UserError as `forget_removed`.
    """
    old = forget_removed(old)
    with suppress(UserError):  # a key that no version knows is a difference like others
        old = config_from_dict(old).to_dict()
    before, after = dict(_dotted(old)), dict(_dotted(new))
    keys = (key for key in (after | before) if before.get(key) != after.get(key))
    return [key for key in keys if key not in ignored and key.partition(".")[0] not in ignored]


def _dotted(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def create_output(config: RunConfig, *, is_new: bool = False) -> Path:
    """Makes the folder and writes the resolved config into it. UserError if it cannot be written.

    Args:
        is_new: no other start may have written a config there since `inspect_output` looked.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_new:  # only one of two starts at the same time can make the file
            (folder / CONFIG_FILE).touch(exist_ok=False)
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINTS_FOLDER)
        write_text(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
    except FileExistsError:
        raise UserError(f"output_dir {folder}: another start has just taken it; choose another output_dir") from None
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}") from None
    return folder


def check_shared(folder: Path, comm: "Communicator") -> None:
    """Checks that all ranks see the folder that rank 0 made. The error names a rank that does not. Collective."""
    token = folder / f".shared-{comm.draw_mark()}"

    def wait() -> None:
        if not wait_until_seen(token.exists):
            raise UserError(f"output_dir {folder} is not the folder of rank 0; it must be on a shared file system")

    comm.on_rank_0(token.touch)
    try:
        comm.all_or_raise(wait)
    finally:
        if comm.rank == 0:
            token.unlink(missing_ok=True)


def wait_until_seen(is_seen: Callable[[], bool]) -> bool:
    """Waits until this rank sees a file of another rank. Returns False after `SHARED_WAIT`."""
    deadline = time.monotonic() + SHARED_WAIT
    while not is_seen():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
