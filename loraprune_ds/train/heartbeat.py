"""Notices in a thread that a rank of another node is lost. A collective tells it only after an hour.

Every rank counts up in a store on rank 0. Rank 0 compares the counts and names a rank whose count stands still. The
others read that name. To them rank 0 is lost if the store stays silent. The thread beats on while its rank saves, cuts
or reads data, which release Python's lock. The clock is the number of looks, not the time. So a job that Slurm suspends
as a whole and continues loses no rank.
"""

import os
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import (
    DistError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

if TYPE_CHECKING:
    from loraprune_ds.zero.comm import Communicator

LOOKS = 10  # a count that stands still for so many looks belongs to a lost rank
PATIENCE = timedelta(seconds=30)  # to open the store
LOST = "lost"


class Heartbeat(threading.Thread):
    """Beats until `close`. The constructor starts it and is collective.

    Args:
        silence: seconds after which a rank counts as lost.

    Attributes:
        contacts: beats that the store has answered.
        lost: the lost rank, once rank 0 has named it.
        problem: why there is no heartbeat. The same on all ranks.
    """

    def __init__(self, comm: "Communicator", silence: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.contacts = 0
        self.lost: str | None = None
        self._interval = silence / LOOKS
        self._closed = threading.Event()
        self._rank = comm.rank
        self._counts = Counts(comm.gather_objects(os.uname().nodename))
        host = os.environ["MASTER_ADDR"]
        self._store = _open_store(host, 0, is_master=True) if comm.rank == 0 else None
        port = comm.gather_objects(0 if self._store is None else self._store.port)[0]
        if comm.rank > 0 and port:
            self._store = _open_store(host, port, is_master=False)
        if self._store is not None:
            self._beat()
        missing = [rank for rank, contacts in enumerate(comm.gather_objects(self.contacts)) if not contacts]
        self.problem = f"rank {missing[0]} does not reach a store at {host}:{port}" if missing else None
        if not missing:
            self.start()

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        while self.lost is None and not self._closed.wait(self._interval):
            self._beat()

    def _beat(self) -> None:
        assert self._store is not None
        try:
            self._store.add(str(self._rank), 1)
            if self._rank == 0 and self.is_alive():
                self._look(self._store)
            elif self._store.check([LOST]):
                self.lost = self._store.get(LOST).decode()
        except DistError:
            return  # rank 0 is gone, or has ended: whoever still runs notices the silence
        self.contacts += 1

    def _look(self, store: TCPStore) -> None:
        counts = store.multi_get([str(rank) for rank in range(self._counts.ranks)])
        self.lost = self._counts.look([int(count) for count in counts])
        if self.lost is not None:
            store.set(LOST, self.lost)


class Counts:
    """Finds the rank whose count stands still.

    Args:
        nodes: the names of the ranks' nodes, in rank order.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        self._nodes = nodes
        self._last = [0] * len(nodes)
        self._still = [0] * len(nodes)

    @property
    def ranks(self) -> int:
        return len(self._nodes)

    def look(self, counts: Sequence[int]) -> str | None:
        """Takes the counts of now. Returns the first rank that has not counted for `LOOKS` looks, and its node."""
        for rank, (before, now) in enumerate(zip(self._last, counts, strict=True)):
            self._still[rank] = self._still[rank] + 1 if now == before else 0
        self._last = list(counts)
        found = next((rank for rank, still in enumerate(self._still) if still >= LOOKS), None)
        return None if found is None else f"rank {found} on {self._nodes[found]}"


def _open_store(host: str, port: int, *, is_master: bool) -> TCPStore | None:
    """Opens the store, on a free port if this rank holds it. None if that fails, for example at a firewall."""
    try:
        return TCPStore(host, port, is_master=is_master, timeout=PATIENCE, wait_for_workers=False)
    except DistError:
        return None
