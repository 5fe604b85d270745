"""Samples the peak memory of a stretch of code. Counts what a process holds, without mapped files."""

import threading
from types import TracebackType

from loraprune_ds.zero.memory import resident_bytes

INTERVAL = 0.005  # seconds


class Peak:
    """Holds `before` and `peak`: RssAnon + RssShmem of this process, in bytes. A context manager."""

    def __enter__(self) -> "Peak":
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    @property
    def extra(self) -> int:
        return self.peak - self.before

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, resident_bytes())
