"""What the parts of a run on one rank share while it lasts."""

from dataclasses import dataclass

from loraprune_ds.train.output import RunStatus
from loraprune_ds.train.recorder import Recorder
from loraprune_ds.train.stop import STOP, Requests
from loraprune_ds.zero.comm import Communicator


@dataclass(frozen=True)
class RunContext:
    """Requests to stop between the steps, and who has to know of them."""

    requests: Requests
    comm: Communicator
    recorder: Recorder
    status: RunStatus

    def stop_requested(self) -> bool:
        """For where no step carries the request and all that could be saved has been. Collective."""
        if self.requests.agree(self.comm) != STOP:
            return False
        self.requests.clear(STOP)
        self.recorder.note(f"stopped at step {self.status.step}; go on with --resume auto")
        return True
