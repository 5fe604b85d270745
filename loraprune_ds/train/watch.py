"""Notices in a thread that the launcher is gone, or another rank of this node. No collective tells it.

The launcher ends the ranks one after the other and gives each 30 s. So ranks that hang in a collective with a dead one
would stay for minutes. And nobody ends the ranks of a launcher that was killed itself.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraprune_ds.zero.comm import Communicator

INTERVAL = 1.0  # seconds
GRACE = 15.0  # seconds in which a rank that lost another may end with a traceback of its own
PARENT = os.getppid()  # read at import, so that a launcher killed while the model loads is noticed too


class Watch(threading.Thread):
    """Runs until `close`. The constructor starts it and is collective."""

    def __init__(self, comm: "Communicator") -> None:
        super().__init__(name="watch", daemon=True)
        self._rank = comm.rank
        here = _pid_namespace()
        everyone = comm.gather_objects((here, os.getpid()))
        self._others = {r: pid for r, (where, pid) in enumerate(everyone) if where == here and r != comm.rank}
        self._launchers = [PARENT, *_deepspeed_runner(PARENT)]
        self._closed = threading.Event()
        self.start()

    def close(self) -> None:
        self._closed.set()

    def run(self) -> None:
        asked = False
        while not self._closed.wait(INTERVAL):
            if not asked and (os.getppid() != PARENT or not all(map(_alive, self._launchers))):
                asked = True
                self._say("the launcher is gone, which is a request to stop")
                os.kill(os.getpid(), signal.SIGTERM)
            if gone := [rank for rank, pid in self._others.items() if not _alive(pid)]:
                self._leave(gone[0])

    def _leave(self, gone: int) -> None:
        if not self._closed.wait(GRACE):
            self._say(f"rank {gone} is gone: leaving")
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


def _deepspeed_runner(launcher: int) -> list[int]:
    """Finds the `deepspeed` command above launch.py, which does not watch it. Empty if something else is there."""
    try:
        if b"deepspeed" not in Path(f"/proc/{launcher}/cmdline").read_bytes():
            return []
        above = int(_stat(launcher)[1])
        words = Path(f"/proc/{above}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
    return [above] if any(word.endswith(b"/deepspeed") for word in words[:3]) else []


def _alive(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return not Path("/proc").is_dir()  # without /proc nobody knows


def _stat(pid: int) -> list[str]:
    """Reads /proc/PID/stat behind the program's name, which may hold anything: state, parent and more."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
