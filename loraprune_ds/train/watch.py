"""Notices in threads when the launcher or another rank is gone. Collectives report that too late.

The launcher ends the ranks one after the other and gives each 30 s, so ranks that hang in a collective with a dead rank
would stay for minutes. A killed launcher ends no rank. Without Slurm, ranks wait for a lost node for an hour. Therefore
every rank counts up in a store on rank 0. Rank 0 compares the counts and names a rank whose count stands still. The
others read that name, and take rank 0 as lost if the store stays silent.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.stop import is_alive

INTERVAL = 1.0  # seconds
GRACE = 15.0  # seconds for a rank that lost another to end with its own traceback
LOOKS = 10  # a rank is lost if its count stands still for this many looks
PATIENCE = timedelta(seconds=30)  # to open the store
LOST = "lost"


class Watch(threading.Thread):
    """Runs until `close`. The constructor starts it and is collective.

    Args:
        silence: seconds without a sign after which a rank counts as lost.
        launchers: process ids, found before the imports, so the death of a launcher during imports is noticed, too.
    """

    def __init__(self, comm: Communicator, silence: float, launchers: Sequence[int]) -> None:
        super().__init__(name="watch", daemon=True)
        self._rank = comm.rank
        self._silence = silence
        self._launchers = launchers
        self._silent_for = 0.0
        self._contacts = 0
        namespace = _pid_namespace()
        # of the other ranks on this machine
        processes = comm.gather_objects((namespace, os.getpid()))
        self._pids = {
            rank: pid
            for rank, (its_namespace, pid) in enumerate(processes)
            if its_namespace == namespace and rank != comm.rank
        }
        self._closed = threading.Event()
        self._heartbeat = None
        if comm.world_size > 1:
            self._heartbeat = Heartbeat(comm, silence)
            problem = self._heartbeat.problem
            if problem and comm.rank == 0:
                self._say(f"no heartbeat, because {problem}; a lost node will be noticed late")
        self.start()

    def close(self) -> None:
        self._closed.set()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def run(self) -> None:
        has_asked = False
        while not self._closed.wait(INTERVAL):
            reason = self._lost_elsewhere()
            if reason is not None:
                self._leave(reason)
            if not has_asked and not all(map(is_alive, self._launchers)):
                has_asked = True
                self._say("the launcher is gone, so the run will stop")
                os.kill(os.getpid(), signal.SIGTERM)
            for rank, pid in self._pids.items():
                if not is_alive(pid):
                    self._leave(f"rank {rank} is gone")
                    break

    def _lost_elsewhere(self) -> str | None:
        """Names a rank that has gone silent. Each call counts as one interval, even a late call."""
        heartbeat = self._heartbeat
        if heartbeat is None or heartbeat.problem:
            return None
        self._silent_for += INTERVAL
        if heartbeat.contacts > self._contacts:
            self._silent_for = 0.0
        self._contacts = heartbeat.contacts
        lost = heartbeat.lost
        if lost is None and self._silent_for >= self._silence:
            lost = "rank 0"
        return None if lost is None else f"{lost} gave no sign for {self._silence:g} s"

    def _leave(self, reason: str) -> None:
        if not self._closed.wait(min(GRACE, self._silence)):
            self._say(f"{reason}: leaving")
            # the main thread waits for that rank in a collective, and cannot be interrupted
            os._exit(1)

    def _say(self, text: str) -> None:
        try:
            os.write(sys.stderr.fileno(), f"rank {self._rank}: {text}\n".encode())
        # the reader of the output is gone, too. A rank must not die of that before it has saved
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.dup2(null, sys.stderr.fileno())


def _pid_namespace() -> str:
    """Names the namespace of process ids. Ranks with the same name see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.getpid()}"


class Heartbeat(threading.Thread):
    """Counts up until `close`. The constructor starts it and is collective.

    The thread keeps beating while its rank saves, cuts or reads data, because these release Python's lock. It counts
    looks, not seconds, so a job that Slurm suspends and continues loses no rank. A rank is lost after `silence` s.
    """

    def __init__(self, comm: Communicator, silence: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.contacts = 0  # beats that the store has answered
        self.lost: str | None = None  # the lost rank, once rank 0 has named it
        self.problem: str | None = None  # why there is no heartbeat. The same on all ranks
        self._interval = silence / LOOKS
        self._rank = comm.rank
        self._closed = threading.Event()
        self._nodes = comm.gather_objects(os.uname().nodename)
        self._counts = [0] * len(self._nodes)
        self._looks_without_beat = [0] * len(self._nodes)
        host = os.environ["MASTER_ADDR"]
        self._store = None
        port = 0
        if comm.rank == 0:
            self._store = _open_store(host, 0, is_master=True)
            if self._store is not None:
                port = self._store.port
        port = comm.from_rank_0(port)
        if comm.rank > 0 and port:
            self._store = _open_store(host, port, is_master=False)
        if self._store is not None:
            self._beat(self._store)
        contacts = comm.gather_objects(self.contacts)
        if all(contacts):
            self.start()
        else:
            self.problem = f"rank {contacts.index(0)} does not reach a store at {host}:{port}"

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        assert self._store is not None
        while self.lost is None and not self._closed.wait(self._interval):
            self._beat(self._store)

    def look(self, counts: Sequence[int]) -> str | None:
        """Compares the counts with the last look. Returns the first lost rank and its node."""
        for rank, (before, now) in enumerate(zip(self._counts, counts, strict=True)):
            self._looks_without_beat[rank] += 1
            if now != before:
                self._looks_without_beat[rank] = 0
        self._counts = list(counts)
        for rank, looks in enumerate(self._looks_without_beat):
            if looks >= LOOKS:
                return f"rank {rank} on {self._nodes[rank]}"
        return None

    def _beat(self, store: TCPStore) -> None:
        try:
            store.add(str(self._rank), 1)
            if self._rank == 0 and self.is_alive():  # every rank has counted once
                counts = store.multi_get([str(rank) for rank in range(len(self._nodes))])
                self.lost = self.look([int(count) for count in counts])
                if self.lost is not None:
                    store.set(LOST, self.lost)
            elif store.check([LOST]):
                self.lost = store.get(LOST).decode()
        except DistError:
            return  # rank 0 is gone or has ended. A rank that still runs notices the silence
        self.contacts += 1


def _open_store(host: str, port: int, *, is_master: bool) -> TCPStore | None:
    """Opens the store, on a free port if this rank holds it. None on failure, for example behind a firewall."""
    try:
        return TCPStore(host, port, is_master=is_master, timeout=PATIENCE, wait_for_workers=False)
    except DistError:
        return None
