"""A simulated accelerator. Its tensors compute on the CPU, refuse to mix with the host's, and every operation is seen.

torch lets Python be the backend of a device. A tensor of the device wraps one of the CPU, so values are the CPU's. What
a card refuses, waits for and holds is then known exactly, on any machine. Not seen: the speed of kernels and their own
buffers, the order between streams, and a second card, because torch's Python backend has one.

Only for processes that start with it (tests/support/device_ranks.py): it can't be taken back.
"""

import sys
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

NAME = "sim"
DEVICE = "sim:0"
SET_UP = "_setup_privateuseone_for_python_backend"  # private to torch
MISSING = (
    None
    if hasattr(backend_registration, SET_UP)
    else f"torch {torch.__version__} has no device in Python"
)
PACKAGE = "/loraprune_ds/"

aten = torch.ops.aten
# the host needs their results, or how many there are
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._linalg_check_errors.default,
    aten._linalg_eigh.default,
    aten._linalg_svd.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
COPY, FOREACH_COPY, CONVERT = (
    aten.copy_.default,
    aten._foreach_copy_.default,
    aten._to_copy.default,
)
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "is_same_size",
}
OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


@dataclass
class Counts:
    """Counts what the device does. A line is "file:number function" of the package, or "" outside it.

    Attributes:
        launches: by (operation, line). Views and allocations launch nothing. A foreach operation is one for each dtype.
        waits: of the host for the device, by (operation, line). Those of CUDA's sync debug mode, a `synchronize`, and
            each collective of objects.
        collectives: by (operation, line).
        bytes_collected: that this rank puts into them.
        bytes_to_device: copied from the host.
        bytes_to_host: likewise.
        alive: bytes of the device's storages, now.
        peak: the most of them since the counting began.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    collectives: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes_collected: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    peak: int = 0

    @property
    def alive(self) -> int:
        return MEMORY.alive


class _Memory:
    """The bytes of the device, by storage."""

    def __init__(self) -> None:
        self.holders: Counter[int] = Counter()  # address of a storage -> tensors that hold it
        self.sizes: dict[int, int] = {}  # the same address -> bytes
        self.alive = 0

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, new or resized."""
        key = storage._cdata
        size = storage.nbytes()
        self.alive += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        for counts in OPEN:
            counts.peak = max(counts.peak, self.alive)


MEMORY = _Memory()
OPEN: list[Counts] = []  # the innermost last: all of them count
HUSHED: list[bool] = []  # not empty within a collective of objects


@contextmanager
def counted() -> Generator[Counts]:
    """Counts launches, waits and bytes while open."""
    counts = Counts(peak=MEMORY.alive)
    OPEN.append(counts)
    try:
        yield counts
    finally:
        OPEN.remove(counts)


def line_of_ours() -> str:
    """Names the innermost line of the package that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if PACKAGE in path and "/tests/" not in path:
            file = path.rpartition(PACKAGE)[2]
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def count_wait(operation: str) -> None:
    if OPEN and not HUSHED:
        key = operation, line_of_ours()
        for counts in OPEN:
            counts.waits[key] += 1


def _count_launches(operation: str, times: int) -> None:
    if OPEN and not HUSHED:
        key = operation, line_of_ours()
        for counts in OPEN:
            counts.launches[key] += times


def _count_moved(moved: int, *, to_host: bool) -> None:
    if not HUSHED:
        for counts in OPEN:
            counts.bytes_to_host += moved * to_host
            counts.bytes_to_device += moved * (not to_host)


class _Hold:
    """A tensor's hold on its storage. The bytes of a storage count until its last tensor has gone."""

    def __init__(self, raw: Tensor) -> None:
        self._storage = raw.untyped_storage()
        self._memory = MEMORY  # globals go before the last tensors of a process
        MEMORY.holders[self._storage._cdata] += 1
        MEMORY.note(self._storage)

    def __del__(self) -> None:
        key = self._storage._cdata
        self._memory.holders[key] -= 1
        if not self._memory.holders[key]:
            del self._memory.holders[key]
            self._memory.alive -= self._memory.sizes.pop(key)


class DeviceTensor(torch.Tensor):
    """A tensor of the device. `raw` is on the CPU and has its values."""

    raw: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(DEVICE),
        )

    def __init__(self, raw: Tensor) -> None:
        self._take(raw)

    def _take(self, raw: Tensor) -> None:
        self.raw = raw
        self._hold = _Hold(raw)

    @property
    def data(self) -> Tensor:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: "DeviceTensor") -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._take(value.raw)

    def tolist(self) -> Any:
        count_wait("tolist")
        _count_moved(self.nbytes, to_host=True)
        return self.raw.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"DeviceTensor({self.raw})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the values. `torch.load` brings them to the device that it is asked for."""
        return self.raw.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _compute(operation, args, kwargs or {})


def _compute(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Computes an operation on the CPU, and counts it."""
    if _has_python_body(operation):
        return operation._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    flat, spec = tree_flatten((args, kwargs))
    device_tensors = [x for x in flat if isinstance(x, DeviceTensor)]
    host_tensors = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    asked = kwargs.get("device")
    to_host = asked is not None and torch.device(asked).type == "cpu"
    _refuse_mixed(operation, device_tensors, host_tensors)
    _count(operation, args, kwargs, device_tensors, host_tensors)
    raw_args, raw_kwargs = tree_unflatten(
        [x.raw if isinstance(x, DeviceTensor) else x for x in flat], spec
    )
    if asked is not None:
        raw_kwargs["device"] = torch.device("cpu")
    result = operation(*raw_args, **raw_kwargs)
    if operation is COPY:
        return args[0]
    if to_host:
        return result
    wrappers = {id(x.raw): x for x in device_tensors}  # of results in place, and of out=

    def wrap(raw: Tensor) -> Tensor:
        known = wrappers.get(id(raw))
        return DeviceTensor(raw) if known is None else known

    return tree_map_only(Tensor, wrap, result)


def _has_python_body(operation: Any) -> bool:
    """Says whether it is an operator of a package, which launches the operations of its body."""
    return operation.namespace not in _TORCHS_OWN and operation.has_kernel_for_dispatch_key(
        DispatchKey.CompositeExplicitAutograd
    )


# bitsandbytes has kernels for a card, so its operators are one launch each
_TORCHS_OWN = {"aten", "prim", "prims", "c10d", "_c10d_functional", "fsdp", "profiler"}
_TORCHS_OWN |= {"bitsandbytes"}


def _refuse_mixed(operation: Any, on_device: list[Any], on_host: list[Tensor]) -> None:
    """Refuses tensors of the host beside those of the device, as CUDA does. It takes scalars, and indices."""
    mixes = {COPY, FOREACH_COPY, CONVERT} | INDEXING
    if on_device and operation not in mixes and any(x.dim() for x in on_host):
        raise RuntimeError(f"{operation}: tensors on {DEVICE} and on cpu")


def _count(
    operation: Any, args: Any, kwargs: Any, on_device: list[Any], on_host: list[Tensor]
) -> None:
    name = operation.name().partition(".")[0].partition("::")[2]
    if operation.namespace == "c10d":
        _count_collective(name, on_device)
    elif not operation.is_view and name not in ALLOCATIONS:
        foreach = name.startswith("_foreach")
        _count_launches(name, len({x.dtype for x in args[0]}) if foreach else 1)
    if operation in READS and on_device:
        count_wait(name)
        _count_moved(on_device[0].element_size(), to_host=True)
    elif operation is aten.repeat_interleave.Tensor and not kwargs.get("output_size"):
        count_wait(name)
    elif operation in INDEXING and on_device:
        _count_indexing(name, args)
    elif operation in (COPY, CONVERT, FOREACH_COPY):
        _count_copies(operation, args, kwargs)


def _count_collective(name: str, on_device: list[Any]) -> None:
    if name == "barrier":
        count_wait(name)
    if OPEN and on_device and not HUSHED:
        key = name, line_of_ours()
        for counts in OPEN:
            counts.collectives[key] += 1
            counts.bytes_collected += sum(x.nbytes for x in on_device)


def _count_indexing(name: str, args: Any) -> None:
    """Counts copies of indices, and of how much a mask selects. A fill of a mask by one number needs neither."""
    indices = [x for x in args[1] if x is not None]
    if len(args) > 2 and not args[2].dim() and all(x.dtype == torch.bool for x in indices):
        return
    for index in indices:
        if not isinstance(index, DeviceTensor):
            count_wait(f"{name} from the host")
            _count_moved(index.nbytes, to_host=False)
        elif index.dtype == torch.bool:
            count_wait(f"{name} by a mask")


def _count_copies(operation: Any, args: Any, kwargs: Any) -> None:
    """Counts copies between the host and the device. One waits unless the host's memory is pinned, and it need not."""
    if operation is CONVERT:
        source = args[0]
        given = kwargs.get("device")
        device = source.device if given is None else torch.device(given)
        # torch pins what it makes on the host
        pairs = [(source, device.type, True)]
    else:
        targets, sources = (args[0], args[1]) if operation is FOREACH_COPY else (args[:1], args[1:])
        pairs = [
            (source, target.device.type, is_pinned(target))
            for target, source in zip(targets, sources, strict=False)
        ]
    free = kwargs.get("non_blocking") or (args[2] if len(args) > 2 else False)
    for source, kind, target_is_pinned in pairs:
        from_host = not isinstance(source, DeviceTensor)
        if from_host != (kind == NAME) or not source.numel():
            continue  # on one side, or nothing
        pinned = is_pinned(source) if from_host else target_is_pinned
        if not (free and pinned):
            count_wait("to the device" if from_host else "to the host")
        _count_moved(source.nbytes, to_host=not from_host)


def is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def pin(tensor: Tensor, device: Any = None) -> Tensor:
    """Copies a tensor of the host to memory that counts as pinned."""
    copy = tensor.clone()
    copy.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return copy


class _Stream(torch.cpu.Stream):
    """The only stream, whatever its name. What it does is done."""

    def record_event(self, event: Any = None) -> Any:
        return torch.cpu.Event() if event is None else event

    def synchronize(self) -> None:
        count_wait("synchronize")


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks a device's module for."""

    Stream, Event = _Stream, torch.cpu.Event
    stream = staticmethod(torch.cpu.stream)

    def current_stream(self, device: Any = None) -> Any:
        return _Stream()

    def device_count(self) -> int:
        return 8  # ranks share the device, and each finds "its own"

    def set_device(self, device: Any) -> None:
        pass

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return 9, 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        count_wait("synchronize")

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return MEMORY.alive

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return PROCESS.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        PROCESS.peak = MEMORY.alive

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass  # the host's, which a trainer sets too


PROCESS = Counts()  # of all that happens
_LIBRARIES: list[Any] = []  # which end with their objects


def register() -> None:
    """Makes the device known to torch. Once in a process."""
    from tests.support import device_patches

    getattr(backend_registration, SET_UP)(NAME, backend_module=_Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _compute(op, args, kwargs), "PrivateUse1")
    _LIBRARIES.append(library)
    device_patches.apply()
    OPEN.append(PROCESS)
