"""Samples the memory of this process, or watches other processes under a limit. Mapped files do not count."""

import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loraprune_ds.ranks.device import resident_bytes

WATCH_EVERY = 0.01  # seconds
INTERVAL = 0.005  # seconds


class Peak:
    """Holds `before` and `peak`: RssAnon + RssShmem of this process, in bytes. A context manager."""

    def __enter__(self) -> "Peak":
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    @property
    def extra(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, resident_bytes())


def tell(folder: Path, rank: int) -> None:
    """Tells the watcher that this process is to be watched, once its imports are done."""
    partial = folder / f"rank-{rank}.partial"
    partial.write_text(json.dumps({"pid": os.getpid(), "imports": resident_bytes()}))
    partial.rename(folder / f"rank-{rank}.json")


def told(folder: Path) -> dict[str, dict[str, int]]:
    """Reads what the processes have told: name -> pid, and bytes held after the imports."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))}


@dataclass(frozen=True)
class Watched:
    """Describes the end of watched processes: peaks in bytes above the imports, and which one was above the limit."""

    exit_code: int
    peaks: dict[str, int]
    killed: str | None


def watch(process: "subprocess.Popen[bytes]", folder: Path, limit: int) -> Watched:
    """Watches until `process` ends. Kills it and its ranks once one holds more than `limit` above its imports."""
    for path in folder.glob("rank-*.json"):
        path.unlink()
    peaks: dict[str, int] = {}
    killed = None
    while process.poll() is None:
        known = told(folder)
        for name, facts in known.items():
            peaks[name] = max(peaks.get(name, 0), held(facts["pid"]) - facts["imports"])
            if peaks[name] > limit and killed is None:
                killed = name
                for other in known.values():
                    with suppress(ProcessLookupError):
                        os.kill(other["pid"], signal.SIGKILL)
                process.terminate()
        time.sleep(WATCH_EVERY)
    return Watched(process.returncode, peaks, killed)


def held(pid: int) -> int:
    """Returns RssAnon + RssShmem of a process in bytes, without mapped files, or 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(
        int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem") if key in fields
    )
