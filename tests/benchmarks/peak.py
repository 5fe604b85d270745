"""Peak memory of a stretch of code, sampled: what a process holds, not what it has mapped from files."""

import threading
from types import TracebackType

from loraprune_ds.zero.memory import resident_bytes

INTERVAL = 0.005  # seconds


class Peak:
    """Context manager. `before` and `peak` are RssAnon + RssShmem of this process, in bytes."""

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
