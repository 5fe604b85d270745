"""Notices in a thread that the launcher is gone, or another rank. No collective reports it in time.

The launcher ends the ranks one after the other and gives each 30 s, so ranks that hang in a collective with a dead one
would stay for minutes. A launcher that was killed ends none. Without Slurm, ranks that wait for a lost node wait for
hours (heartbeat.py).
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraprune_ds.train.heartbeat import Heartbeat
from loraprune_ds.train.launchers import is_alive

if TYPE_CHECKING:
    from loraprune_ds.zero.comm import Communicator

INTERVAL = 1.0  # seconds
GRACE = 15.0  # seconds in which a rank that lost another may end with its own traceback


class Watch(threading.Thread):
    """Runs until `close`. The constructor starts it and is collective.

    Args:
        silence: seconds after which a rank that gives no sign counts as lost.
        launchers: process ids, found before the imports, so a launcher that is killed meanwhile is noticed, too.
    """

    def __init__(self, comm: "Communicator", silence: float, launchers: Sequence[int]) -> None:
        super().__init__(name="watch", daemon=True)
        self._rank, self._silence, self._launchers = comm.rank, silence, launchers
        self._silent_for, self._contacts = 0.0, 0
        here = _pid_namespace()
        everyone = comm.gather_objects((here, os.getpid()))
        self._others = {r: pid for r, (where, pid) in enumerate(everyone) if where == here and r != comm.rank}
        self._closed = threading.Event()
        self._heartbeat = Heartbeat(comm, silence) if comm.world_size > 1 else None
        if self._heartbeat is not None and self._heartbeat.problem and comm.rank == 0:
            self._say(f"no heartbeat, since {self._heartbeat.problem}: a lost node is noticed late")
        self.start()

    def close(self) -> None:
        self._closed.set()
        if self._heartbeat is not None:
            self._heartbeat.close()

    def run(self) -> None:
        asked = False
        while not self._closed.wait(INTERVAL):
            if lost := self._lost_elsewhere():
                self._leave(lost)
            if not asked and not all(map(is_alive, self._launchers)):
                asked = True
                self._say("the launcher is gone, which is a request to stop")
                os.kill(os.getpid(), signal.SIGTERM)
            if gone := [rank for rank, pid in self._others.items() if not is_alive(pid)]:
                self._leave(f"rank {gone[0]} is gone")

    def _lost_elsewhere(self) -> str | None:
        """Names a rank that gives no sign any more. Each call counts as one interval, however late it comes."""
        heartbeat = self._heartbeat
        if heartbeat is None or heartbeat.problem:
            return None
        self._silent_for = 0.0 if heartbeat.contacts > self._contacts else self._silent_for + INTERVAL
        self._contacts = heartbeat.contacts
        lost = heartbeat.lost or ("rank 0" if self._silent_for >= self._silence else None)
        return lost and f"{lost} gave no sign for {self._silence:g} s"

    def _leave(self, reason: str) -> None:
        if not self._closed.wait(min(GRACE, self._silence)):
            self._say(f"{reason}: leaving")
            os._exit(1)  # the main thread waits for that rank in a collective and cannot be told

    def _say(self, text: str) -> None:
        try:
            os.write(sys.stderr.fileno(), f"rank {self._rank}: {text}\n".encode())
        except OSError:  # the reader of the output is gone too, and a rank must not die of that before it has saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.dup2(nowhere, sys.stderr.fileno())


def _pid_namespace() -> str:
    """Names what process ids mean here. Ranks with the same name see each other's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown {os.getpid()}"
