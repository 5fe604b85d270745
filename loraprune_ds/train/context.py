"""Holds the state that the parts of a run share on one rank. Keeps status.json true, however the run ends."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from traceback import format_exception_only
from types import TracebackType
from typing import Literal

from loraprune_ds.checkpoint.layout import State, Status, read_status, write_status
from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import RankError, RunError, UserError, is_shared, one_line
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.recorder import RunRecorder
from loraprune_ds.train.stop import STOP, RequestListener
from loraprune_ds.zero.comm import Communicator


class RunStatus:
    """Writes "running" on rank 0 while it is open, and "failed" with one line after an exception.

    A rank that fails alone writes its own error, because rank 0 only sees a broken connection.

    Args:
        first: the number of steps done before this start.
        mark: identifies this start. The same on all ranks.
    """

    def __init__(self, folder: Path, steps: int, *, first: int, mark: str, rank: int = 0, ranks: int = 1) -> None:
        self.folder, self.steps = folder, steps
        self.step = first
        self.mark = mark
        self._rank, self._ranks = rank, ranks

    def __enter__(self) -> "RunStatus":
        if self._rank == 0:
            self._write("running")
        return self

    def update(self, step: int) -> None:
        """Writes the number of steps done. Raises RankError like `check_owner`."""
        self.step = step
        if self._rank == 0:  # one rank is enough. A thousand would read the file at every step
            recorded = self.check_owner(RankError)
            if recorded is None or recorded.state != "failed":  # otherwise another rank has written its error
                self._write("running")

    def check_owner(self, error: type[RunError] = RunError) -> Status | None:
        """Raises the error if another process continues this run. On rank 0 only."""
        # A process on a lost node may wake up again. By then the run may continue on other nodes, or be finished.
        recorded = self._recorded()
        if recorded is not None and recorded.mark != self.mark:
            raise error(f"output_dir {self.folder}: another process has taken over this run, so this one ends")
        return recorded

    def end(self, state: Literal["finished", "stopped"], error: str | None = None) -> None:
        """Writes the final state of this process."""
        if self._rank == 0:
            self._write(state, error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (self._rank > 0 and is_shared(error)):
            return
        recorded = self._recorded()
        # Otherwise another rank wrote its error first.
        if recorded is None or (recorded.mark == self.mark and recorded.state == "running"):
            with suppress(OSError):  # a full disk must not hide the error
                self._write("failed", self._line(error))

    def _line(self, error: BaseException) -> str:
        if isinstance(error, UserError):
            return one_line(error)
        last = " ".join("".join(format_exception_only(error)).split())
        return f"rank {self._rank}: {last}" if self._ranks > 1 else last

    def _write(self, state: State, error: str | None = None) -> None:
        write_status(self.folder, Status(state, self.step, self.steps, error=error, mark=self.mark))

    def _recorded(self) -> Status | None:
        with suppress(UserError):
            return read_status(self.folder)
        return None


@dataclass(frozen=True)
class RunContext:
    prepared: Prepared
    checkpoint: TrainingCheckpoint | None  # that the run resumes from
    comm: Communicator
    requests: RequestListener
    recorder: RunRecorder
    status: RunStatus

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def resumed_from(self) -> list[int]:
        """The steps at which the run was resumed."""
        return [*self.checkpoint.state.resumed_from, self.checkpoint.state.step] if self.checkpoint else []

    def stop_requested(self) -> bool:
        """Checks for requests to stop outside of steps, and honours one. Returns True if there was one. Collective."""
        if self.requests.agree(self.comm) != STOP:
            return False
        self.check_owner()  # the file may address the other process
        self.requests.clear(STOP)
        self.recorder.show(f"stopped at step {self.status.step}; go on with --resume auto")
        return True

    def check_owner(self) -> None:
        """Raises RunError on all ranks if another process continues this run. Collective."""
        self.comm.on_rank_0(self.status.check_owner)
