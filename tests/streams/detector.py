"""Happens-before analysis of memory accesses on streams. Knows neither DeepSpeed nor this package.

It is that of torch.cuda._sanitizer, whose clocks it uses, with four differences: an access is a range of bytes, not a
data pointer; a freed block may be taken by the next allocation of its stream, as in torch's caching allocator; host
memory and the host's thread take part; and only written waits order anything. `.item()` and blocking copies order only
what the host itself reads: somebody may make them asynchronous.
"""

import sys
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.cuda._sanitizer import StreamSynchronizations

# the "stream" of the thread that launches everything. Work of a stream begins after all that it did before
HOST = -1
READ, WRITE = False, True
SHOWN = ("/deepspeed/", "/loraprune_ds/", "/tests/", "/transformers/", "/peft/", "/torch/optim/")
HIDDEN = ("/tests/streams/", "/deepspeed/comm/", "/deepspeed/utils/nvtx.py")
NOW = 0  # the event that is recorded and waited for at once


class Access(NamedTuple):
    stream: int
    writes: bool
    operation: str
    # "file.py:line function" of the four innermost frames in code of interest
    site: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation} {'writes' if self.writes else 'reads'}, {' < '.join(self.site)}"


@dataclass
class Storage:
    """What is known of a live storage."""

    stream: int  # that allocated it. HOST's are the host's memory
    pinned: bool = False
    recorded: set[int] = field(default_factory=set)  # streams of `record_stream`
    # (first byte, end, stream, writes) -> (number of the launch, the last such access)
    accesses: dict[tuple[int, int, int, bool], tuple[int, Access]] = field(default_factory=dict)
    alive: Any = None


class Detector:
    """Receives launches, waits, allocations and frees in the order of the host's thread."""

    def __init__(self) -> None:
        self.on = False
        self.storages: dict[int, Storage] = {}
        self._deaths = deque[int]()
        self.reset()

    def reset(self) -> None:
        """Begins anew, with all work finished. Where storages are is not forgotten."""
        self.number = 0
        self.order = StreamSynchronizations()
        # by the stream that may allocate it next
        self.freed: dict[int, list[tuple[Storage, Access]]] = {}
        # pairs without an order. The second may be a `free`
        self.reports = set[tuple[Access, Access]]()
        self._bury()
        for known in self.storages.values():
            known.accesses.clear()
            known.recorded.clear()

    def wait(self, stream: int, other: int) -> None:
        """Orders the next work of a stream after all that another one has. HOST has then only read its results."""
        self.order.record_state(NOW, other)
        self.order.stream_wait_for_event(stream, NOW)

    def _is_ordered(self, stream: int, number: int, before: Access) -> bool:
        """Tells whether launch `number`, with the access `before`, is over when the next work of `stream` begins."""
        return before.stream in (stream, HOST) or self.order.is_ordered_after(
            stream, number, before.stream
        )

    # Storages

    def storage(self, tensor: Tensor, stream: int = HOST) -> Storage:
        """Returns the record of a tensor's storage. `stream` is that of a new one."""
        self._bury()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            known = self.storages[key] = Storage(stream)
            known.alive = weakref.ref(storage, lambda _, key=key: self._deaths.append(key))
            if stream != HOST:
                self._take_freed(stream)
                self._begin(stream)
                self._touch(
                    known, (0, storage.nbytes()), Access(stream, WRITE, "allocation", site())
                )
        return self.storages[key]

    def _bury(self) -> None:
        while self._deaths:
            known = self.storages.pop(self._deaths.popleft(), None)
            if (
                known
                and known.stream != HOST
                and any(used.stream != known.stream for _, used in known.accesses.values())
            ):
                free = Access(known.stream, WRITE, "free", site())
                self.freed.setdefault(known.stream, []).append((known, free))

    def _take_freed(self, stream: int) -> None:
        for known, free in self.freed.pop(stream, ()):
            for number, access in known.accesses.values():
                if access.stream not in known.recorded and not self._is_ordered(
                    stream, number, access
                ):
                    self.reports.add((access, free))

    # Accesses

    def launch(self, stream: int, operation: str, accesses: Iterable[tuple[Tensor, bool]]) -> None:
        """Notes work on a stream, or of the HOST: an operation with the tensors that it reads or writes."""
        self._begin(stream)
        here = site()
        for tensor, writes in accesses:
            if tensor.numel():
                known = self.storage(tensor, stream)
                self._touch(known, byte_range(tensor), Access(stream, writes, operation, here))

    def _begin(self, stream: int) -> None:
        self.number += 1
        self.order.update_seq_num(stream, self.number)

    def _touch(self, known: Storage, span: tuple[int, int], access: Access) -> None:
        low, high = span
        for key, (number, other) in list(known.accesses.items()):
            start, end = key[:2]
            if start >= high or end <= low:
                continue
            if not self._is_ordered(access.stream, number, other):
                if access.writes or other.writes:
                    self.reports.add((other, access))
            elif access.writes and low <= start and end <= high and access.stream != HOST:
                # whatever is ordered after this write is ordered after that access
                del known.accesses[key]
        known.accesses[low, high, access.stream, access.writes] = (self.number, access)


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """Returns the bytes of the storage from a view's first element to its last."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    last = first + sum(
        int((n - 1) * stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return first * size, (last + 1) * size


def site() -> tuple[str, ...]:
    frames, frame = list[str](), sys._getframe(1)
    while frame is not None and len(frames) < 4:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        shown = any(part in path for part in SHOWN) and not any(part in path for part in HIDDEN)
        if shown and not function.startswith("<"):  # <listcomp>, which Python 3.12 has no more
            frames.append(f"{path.rpartition('/')[2]}:{frame.f_lineno} {function}")
        frame = frame.f_back
    return tuple(frames)
