"""Decides how a start uses its output folder, and makes it. Keeps status.json true, however the run ends."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from traceback import format_exception_only
from typing import TYPE_CHECKING, Literal

import yaml

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.state import State, newest_state
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict, differences, merge
from loraprune_ds.errors import RankError, RunError, UserError, blame, is_shared, one_line, require
from loraprune_ds.files import JsonObject, remove_leftovers, write_text, writes_into

if TYPE_CHECKING:
    from loraprune_ds.ranks.comm import Communicator

CONFIG_FILE = "config.yaml"
# Settings that may differ in the same run: how it is shown and measured, and where.
NOT_THE_RUN = ("logging", "output_dir", "evaluate.after")
# A resumed run may also change how it saves and how it splits a global batch.
MAY_DIFFER = (*NOT_THE_RUN, "checkpoint", "deepspeed", "model.text_only", "train.micro_batch_size")
CHOOSE = "choose another output_dir"
GO_ON = f"go on with --resume auto, or {CHOOSE}"
# seconds; a network file system may cache for half a minute that a file is missing
SHARED_WAIT = 60.0


@dataclass
class EarlierRun:
    """Reads the files of an earlier start in a folder, each once."""

    folder: Path

    @cached_property
    def config(self) -> JsonObject | None:
        """The resolved config. None if it is missing or damaged."""
        try:
            raw = yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        return raw if isinstance(raw, dict) and raw else None

    @cached_property
    def newest_state(self) -> State | None:
        return newest_state(self.folder / layout.CHECKPOINTS_FOLDER)


class OutputFolder:
    """The output folder of one start. Nothing is written before `create`.

    A resumed run keeps its settings unless new ones are given, so a later default changes no run.

    Args:
        given: the keys that the YAML and `--set` give.
        resume: the value of `--resume`: None, "auto" or a path.

    Attributes:
        resume_path: the path that `--resume` names, resolved. None with `auto`.

    Raises:
        UserError: as `config_from_dict`. CheckpointMismatch if the run is of another format.
    """

    def __init__(self, given: JsonObject, resume: str | None = None) -> None:
        output_dir = given.get("output_dir")
        self._resume = resume
        self.resume_path: Path | None = None
        folders: list[Path] = []
        with _unreadable_in_one_line(output_dir):
            if isinstance(output_dir, str):
                folders.append(Path(output_dir).expanduser())
            if resume is not None and resume != "auto":
                self.resume_path = Path(resume).resolve()
                # A run, its folder of checkpoints, or one checkpoint.
                folders += [self.resume_path, *self.resume_path.parents[:2]]
            earlier = [EarlierRun(folder) for folder in folders]
            recorded = _recorded_config(earlier)
        try:
            config = config_from_dict(merge(recorded, given))
        except UserError:  # settings that do not fit belong to another run, which `start` refuses
            config = config_from_dict(given)
        self.config = replace(config, output_dir=os.path.expanduser(config.output_dir))
        self.path = Path(self.config.output_dir)
        self._earlier = earlier[0] if isinstance(output_dir, str) else EarlierRun(self.path)
        self._continued = [] if resume is None else earlier

    @cached_property
    def continued(self) -> State | None:
        """The newest state of the run that goes on. None for a new run."""
        return next((run.newest_state for run in self._continued if run.newest_state), None)

    @cached_property
    def start(self) -> Literal["fresh", "resume", "finished"]:
        """Returns how to begin, without touching the folder.

        Raises:
            UserError: the folder is not accessible, holds another run or foreign files, or holds an unfinished run
                without `--resume`. Or the path to resume from does not exist, or is elsewhere although the folder
                holds a run.
        """
        with _unreadable_in_one_line(self.path):
            self._check_access(os.R_OK | os.X_OK, "readable")
            if self.resume_path is not None and not self.resume_path.is_dir():
                raise UserError(f"--resume {self._resume}: no such folder")
            status = self._read_status()
            if status is not None and status.state == "finished":
                self._check_same_run(NOT_THE_RUN)
                return "finished"
            self._check_access(os.W_OK, "writable")
            if self._resume is not None:
                self._check_resume(self.resume_path)
                return "resume"
            require(
                status is None,
                f"output_dir {self.path} holds an unfinished run ({status}); {GO_ON}",
            )
            self._refuse_foreign()
            return "fresh"

    def create(self, config: RunConfig) -> None:
        """Makes the folder and writes the run's `config` into it. UserError if it cannot be made."""
        config_file = self.path / CONFIG_FILE
        is_new = self.start == "fresh"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_new:  # only one of two simultaneous starts can make the file
                config_file.touch(exist_ok=False)
            remove_leftovers(self.path)
            remove_leftovers(self.path / layout.CHECKPOINTS_FOLDER)
            write_text(config_file, yaml.safe_dump(config.to_dict(), sort_keys=False))
        except FileExistsError:
            raise UserError(
                f"output_dir {self.path}: another start has just taken it; {CHOOSE}"
            ) from None
        except OSError as error:
            raise blame(
                error, f"output_dir {self.path} cannot be written: {error.strerror}"
            ) from None

    def check_shared(self, comm: "Communicator") -> None:
        """Checks that all ranks see the folder that rank 0 made. The error names a rank that does not. Collective."""
        token = self.path / f".shared-{comm.draw_mark()}"

        def wait() -> None:
            deadline = time.monotonic() + SHARED_WAIT
            while not token.exists():
                require(
                    time.monotonic() <= deadline,
                    f"output_dir {self.path} is not the folder of rank 0; it must be on a shared file system",
                )
                time.sleep(0.1)

        comm.write_on_rank_0(self.path, token.touch)
        try:
            comm.all_or_raise(wait)
        finally:
            if comm.rank == 0:
                token.unlink(missing_ok=True)

    def _read_status(self) -> layout.Status | None:
        """Reads status.json. A crash of the machine can leave it empty, but the checkpoints are enough for a resume."""
        try:
            return layout.read_status(self.path)
        except layout.CheckpointMismatch:
            raise
        except UserError as error:
            if self._resume is None:
                raise UserError(f"{error}; {GO_ON}") from None
            return None

    def _check_access(self, mode: int, described: str) -> None:
        """Checks the folder, or the nearest parent that exists."""
        path = self.path
        nearest = next(filter(os.path.exists, (path, *path.absolute().parents)))
        require(nearest.is_dir(), f"output_dir {path}: {nearest} is not a folder")
        require(os.access(nearest, mode), f"output_dir {path}: {nearest} is not {described}")

    def _refuse_foreign(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"output_dir {self.path} is not empty and holds no run; {CHOOSE}")

    def _check_resume(self, path: Path | None) -> None:
        files_of_a_run = (CONFIG_FILE, layout.STATUS_FILE, layout.CHECKPOINTS_FOLDER)
        if not any((self.path / name).exists() for name in files_of_a_run):
            self._refuse_foreign()
        elif path is not None and not path.is_relative_to(self.path.resolve()):
            raise UserError(
                f"output_dir {self.path} holds a run already, so it cannot resume from {path}; {GO_ON}"
            )
        _ = self._earlier.newest_state  # raises the error line for another format
        if self._earlier.config:
            self._check_same_run(MAY_DIFFER)

    def _check_same_run(self, ignored: Sequence[str]) -> None:
        folder = self.path
        path = folder / CONFIG_FILE
        if self._earlier.config is None:
            raise UserError(f"{path} is missing or damaged; remove {folder} or {CHOOSE}")
        recorded = layout.recorded_config(self._earlier.config, path)
        different = ", ".join(differences(recorded, self.config, ignored))
        require(
            not different, f"output_dir {folder} holds another run ({different} differs); {CHOOSE}"
        )


def _recorded_config(runs: Sequence[EarlierRun]) -> JsonObject:
    """Returns the config of the first run that has one. Empty if no run has."""
    for run in runs:
        if run.config:
            return run.config
    # a crash may have lost the file, but every checkpoint holds the config
    for run in runs:
        if run.newest_state:
            return run.newest_state.origin.config
    return {}


@contextmanager
def _unreadable_in_one_line(folder: object) -> Iterator[None]:
    """Reports a name that is too long, or a disk that does not answer, in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be read: {error.strerror}") from None


class RunStatus:
    """Writes "running" on rank 0 while it is open, and "failed" with one line after an exception.

    A rank that fails alone writes its own error, because rank 0 only sees a broken connection.

    Args:
        first: the number of steps done before this start.
        mark: identifies this start. The same on all ranks.
    """

    def __init__(
        self, folder: Path, steps: int, *, first: int, mark: str, rank: int = 0, ranks: int = 1
    ) -> None:
        self.folder = folder
        self.steps = steps
        self.step = first
        self.mark = mark
        self._rank = rank
        self._ranks = ranks

    def __enter__(self) -> "RunStatus":
        if self._rank == 0:
            self._write("running")
        return self

    def update(self, step: int) -> None:
        """Writes the number of steps done. Raises RankError like `check_owner`."""
        self.step = step
        if self._rank == 0:  # one rank is enough. A thousand would read the file at every step
            recorded = self.check_owner(RankError)
            # otherwise another rank has written its error
            if recorded is None or recorded.state != "failed":
                self._write("running")

    def check_owner(self, error: type[RunError] = RunError) -> layout.Status | None:
        """Raises the error if another process continues this run. On rank 0 only."""
        # A process on a lost node may wake up again. By then the run may continue on other nodes, or be finished.
        recorded = self._recorded()
        if recorded is not None and recorded.mark != self.mark:
            raise error(
                f"output_dir {self.folder}: another process has taken over this run, so this one ends"
            )
        return recorded

    def end(self, state: Literal["finished", "stopped"], error: str | None = None) -> None:
        """Writes the final state of this process."""
        if self._rank == 0:
            self._write(state, error)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or (self._rank > 0 and is_shared(error)):
            return
        recorded = self._recorded()
        # Otherwise another rank wrote its error first.
        if recorded is None or (recorded.mark == self.mark and recorded.state == "running"):
            with suppress(RankError):  # a full disk must not hide the error
                self._write("failed", self._line(error))

    def _line(self, error: BaseException) -> str:
        if isinstance(error, UserError):
            return one_line(error)
        last = " ".join("".join(format_exception_only(error)).split())
        return f"rank {self._rank}: {last}" if self._ranks > 1 else last

    def _write(self, state: layout.State, error: str | None = None) -> None:
        status = layout.Status(state, self.step, self.steps, error=error, mark=self.mark)
        with writes_into(self.folder, RankError):
            layout.write_status(self.folder, status)

    def _recorded(self) -> layout.Status | None:
        with suppress(UserError):
            return layout.read_status(self.folder)
        return None
