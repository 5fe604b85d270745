"""Holds what the parts of a run share on one rank, from its preparation to its end."""

from dataclasses import dataclass
from pathlib import Path

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import RunConfig
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.recorder import RunRecorder
from loraprune_ds.train.status import RunStatus
from loraprune_ds.train.stop import STOP, RequestListener
from loraprune_ds.zero.comm import Communicator


@dataclass(frozen=True)
class RunContext:
    config: RunConfig
    prepared: Prepared
    checkpoint: TrainingCheckpoint | None  # that the run resumes from
    comm: Communicator
    requests: RequestListener
    recorder: RunRecorder
    status: RunStatus

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def resumed_from(self) -> list[int]:
        """The steps at which the run was resumed."""
        return [*self.checkpoint.state.resumed_from, self.checkpoint.state.step] if self.checkpoint else []

    def stop_requested(self) -> bool:
        """Whether a rank was asked to stop, where no step carries the request. If so, it is honoured. Collective."""
        if self.requests.agree(self.comm) != STOP:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """Honours a request to stop where nothing is left to save. Collective."""
        self.check_owner()  # the file may ask the other process
        self.requests.clear(STOP)
        self.recorder.show(f"stopped at step {self.status.step}; go on with --resume auto")

    def check_owner(self) -> None:
        """Raises RunError on all ranks if another process continues this run. Collective."""
        self.comm.on_rank_0(self.status.check_owner)
