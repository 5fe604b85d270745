"""Notices in a thread that a rank on another node is lost. A collective reports it only after an hour.

Every rank counts up in a store on rank 0. Rank 0 compares the counts and names a rank whose count stands still. The
others read that name. They take rank 0 as lost if the store stays silent. The thread keeps beating while its rank
saves, cuts or reads data, which release Python's lock. It counts looks, not seconds, so a job that Slurm suspends and
continues loses no rank.
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

LOOKS = 10  # a rank whose count stands still for this many looks is lost
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
        self._nodes = comm.gather_objects(os.uname().nodename)
        self._counts, self._still = [0] * len(self._nodes), [0] * len(self._nodes)
        host = os.environ["MASTER_ADDR"]
        self._store = _open_store(host, 0, is_master=True) if comm.rank == 0 else None
        port = comm.gather_objects(0 if self._store is None else self._store.port)[0]
        if comm.rank > 0 and port:
            self._store = _open_store(host, port, is_master=False)
        if self._store is not None:
            self._beat(self._store)
        missing = [rank for rank, contacts in enumerate(comm.gather_objects(self.contacts)) if not contacts]
        self.problem = f"rank {missing[0]} does not reach a store at {host}:{port}" if missing else None
        if not missing:
            self.start()

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        assert self._store is not None
        while self.lost is None and not self._closed.wait(self._interval):
            self._beat(self._store)

    def look(self, counts: Sequence[int]) -> str | None:
        """Compares the counts with the last look. Returns the first lost rank and its node."""
        for rank, (before, now) in enumerate(zip(self._counts, counts, strict=True)):
            self._still[rank] = self._still[rank] + 1 if now == before else 0
        self._counts = list(counts)
        lost = (rank for rank, still in enumerate(self._still) if still >= LOOKS)
        return next((f"rank {rank} on {self._nodes[rank]}" for rank in lost), None)

    def _beat(self, store: TCPStore) -> None:
        try:
            store.add(str(self._rank), 1)
            if self._rank == 0 and self.is_alive():  # all ranks have counted once
                counts = store.multi_get([str(rank) for rank in range(len(self._nodes))])
                self.lost = self.look([int(count) for count in counts])
                if self.lost is not None:
                    store.set(LOST, self.lost)
            elif store.check([LOST]):
                self.lost = store.get(LOST).decode()
        except DistError:
            return  # rank 0 is gone, or has ended: a rank that still runs notices the silence
        self.contacts += 1


def _open_store(host: str, port: int, *, is_master: bool) -> TCPStore | None:
    """Opens the store, on a free port if this rank holds it. None if that fails, for example at a firewall."""
    try:
        return TCPStore(host, port, is_master=is_master, timeout=PATIENCE, wait_for_workers=False)
    except DistError:
        return None
