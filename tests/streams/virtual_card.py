"""A card that does not exist: torch runs on the CPU, with streams and pinned memory to report on.

Tensors of the card are on "cpu:0", those of the host on "cpu". torch drops the index of a CPU, so storages are tagged.
Everything runs at once, in order and with the right numbers. The detector learns what would have been queued where.
"""

import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.cuda._sanitizer import zip_arguments
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from tests.streams.detector import HOST, READ, WRITE, Access, Detector

CARD, CPU = torch.device("cpu:0"), torch.device("cpu")
DEVICE: Any = Tensor.device.__get__  # type: ignore[attr-defined]
DETECTOR = Detector()

# Streams and waits

left_out: set[str] = set()  # functions whose waits are taken out, as "file.py function"
taken_out: set[str] = set()


def is_left_out() -> bool:
    """Tells whether the wait that is called here was taken out. A `settle_shards` counts for its caller."""
    frame: Any = sys._getframe(1)
    while (
        frame.f_globals["__name__"].startswith("tests.streams.")
        or frame.f_code.co_name == "settle_shards"
    ):
        frame = frame.f_back
    place = f"{os.path.basename(frame.f_code.co_filename)} {frame.f_code.co_name}"
    taken_out.update({place} & left_out)
    return place in left_out


class Stream:
    """A stream. The current one is the last that was entered."""

    numbers = itertools.count()

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(Stream.numbers)

    def __enter__(self) -> None:
        streams.append(self)

    def __exit__(self, *_: Any) -> None:
        streams.pop()

    def wait_stream(self, other: "Stream") -> None:
        if not is_left_out():
            DETECTOR.wait(self.number, other.number)

    def synchronize(self) -> None:
        if not is_left_out():
            DETECTOR.order.all_streams_wait_for_stream(self.number)


streams = [Stream()]  # the default one, number 0


def here() -> int:
    return streams[-1].number


def synchronize(*_: Any) -> None:
    if not is_left_out():
        DETECTOR.order.sync_all_streams()


# Where tensors are, and how they move


def tensors(values: Any) -> list[Tensor]:
    """Returns the tensors that have memory of the host or of the card."""
    plain = (
        x
        for x in tree_iter(values)
        if type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
    )
    return [x for x in plain if not x.is_meta]


def is_card(tensor: Tensor) -> bool:
    return DETECTOR.storage(tensor).stream != HOST


def device_of(tensor: Tensor) -> torch.device:
    # ZeRO-3 frees a parameter in a backward pass, where no mode sees that its empty data is the card's
    if hasattr(tensor, "ds_status") and not tensor.numel():
        return CARD
    return CARD if tensors(tensor) and is_card(tensor) else DEVICE(tensor)


def to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Moves a tensor like `Tensor.to`. Reports a copy between host and card."""
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
    if args and isinstance(args[0], Tensor):
        device = device_of(args[0])
    moves = device in (CPU, CARD) and bool(tensors(tensor)) and (device == CARD) != is_card(tensor)
    how = {
        "dtype": dtype,
        "memory_format": memory_format or torch.preserve_format,
        "copy": copy or moves,
    }
    if not moves:
        return tensor.to(device=CPU if device == CARD else device, non_blocking=non_blocking, **how)
    with _disable_current_modes():
        out = tensor.to(**how)
    known = DETECTOR.storage(out, here() if device == CARD else HOST)
    known.pinned = non_blocking and device == CPU  # as torch allocates it
    transfer(tensor, out, non_blocking, "to")
    return out


def transfer(source: Tensor, target: Tensor, non_blocking: bool, operation: str) -> None:
    """Reports a copy between host and card on the current stream. The result of a blocking one arrives."""
    down = is_card(source)
    pinned = DETECTOR.storage(target if down else source).pinned
    reader = here() if down or (pinned and non_blocking) else HOST
    DETECTOR.launch(reader, operation, [(source, READ)])
    DETECTOR.launch(here(), operation, [(target, WRITE)])
    if not non_blocking or (down and not pinned):
        DETECTOR.wait(HOST, here())


def pin_memory(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    if DETECTOR.storage(tensor).pinned:
        return tensor
    with _disable_current_modes():
        out = tensor.clone()
    DETECTOR.storage(out).pinned = True
    DETECTOR.launch(HOST, "pin_memory", [(tensor, READ), (out, WRITE)])
    return out


def record_stream(tensor: Tensor, stream: Stream) -> None:
    if DETECTOR.on and not is_left_out():
        DETECTOR.storage(tensor).recorded.add(stream.number)


def read(method: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Calls `tolist` or `numpy`, which no dispatch sees."""
    DETECTOR.launch(here() if is_card(tensor) else HOST, method.__name__, [(tensor, READ)])
    DETECTOR.wait(HOST, here())
    return method(tensor, *args, **kwargs)


def make(function: Callable[..., Tensor], *args: Any, device: Any = CPU, **kwargs: Any) -> Tensor:
    """Calls `torch.tensor` or `torch.as_tensor`, which no dispatch sees."""
    on_card = torch.device(device or CPU) == CARD
    made = function(*args, device=CPU if on_card else device, **kwargs)
    return to(made, CARD) if on_card else made


METHODS: dict[Any, Callable[..., Any]] = {
    DEVICE: device_of,
    Tensor.to: to,
    Tensor.cpu: lambda tensor, *_, **__: to(tensor, CPU),
    Tensor.pin_memory: pin_memory,
    Tensor.is_pinned: lambda tensor, *_: DETECTOR.storage(tensor).pinned,
    **{method: partial(read, method) for method in (Tensor.tolist, Tensor.numpy)},
    **{function: partial(make, function) for function in (torch.tensor, torch.as_tensor)},
}


class Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (METHODS.get(func) or func)(*args, **(kwargs or {}))


# Operations

# Their result makes the host wait: it is a number or a size.
RECEIVED = (
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_consecutive",
    "masked_select",
    "equal",
    "bincount",
)
INDEXED = ("index", "index_put", "index_put_")
UNSEEN = ("c10d", "c10d_functional", "_c10d_functional", "profiler", "prim")  # namespaces


class Operations(TorchDispatchMode):
    """Reports what each operation reads and writes, by its schema."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._foreach_copy_.default:  # between devices it is many copies
            for pair in zip(*args, strict=True):
                self.__torch_dispatch__(torch.ops.aten.copy_.default, types, pair)
            return None
        out = func(*args, **kwargs | ({"device": CPU} if kwargs.get("device") == CARD else {}))
        if func.namespace not in UNSEEN:
            report(func._schema, args, kwargs, out)
        return out


def report(schema: Any, args: Any, kwargs: Any, out: Any) -> None:
    name, given = schema.name.removeprefix("aten::"), tensors((args, kwargs))
    if name == "copy_" and len(given) == 2 and is_card(given[0]) != is_card(given[1]):
        transfer(
            given[1],
            given[0],
            bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2])),
            name,
        )
        return
    on_card = runs_on_card(name, args, given, kwargs.get("device"))
    accesses = [*inputs(name, schema, args, kwargs), *outputs(name, given, tensors(out), on_card)]
    for stream in (here(), HOST):
        if own := [(x, writes) for x, writes in accesses if is_card(x) == (stream != HOST)]:
            DETECTOR.launch(stream, name, own)
    by_mask = name in INDEXED and any(
        x.dtype in (torch.bool, torch.uint8) for x in tensors(args[1])
    )
    if on_card and (name in RECEIVED or by_mask):
        DETECTOR.wait(HOST, here())


def runs_on_card(name: str, args: Any, given: list[Tensor], device: torch.device | None) -> bool:
    """Tells where an operation runs. Fails if it mixes tensors of the card and of the host."""
    if device == CARD or (device == CPU and not given):
        return device == CARD
    wide = [x for x in given if x.dim()] or given
    free = list(tree_iter(args[1])) if name in INDEXED else []  # indices may be the host's
    strays = [
        x for x in wide if x.dim() and not is_card(x) and not any(x is index for index in free)
    ]
    on_card = any(map(is_card, wide))
    assert not (on_card and strays) or reads_sizes(name), (
        f"{name} mixes tensors of the card and of the host"
    )
    return on_card


def reads_sizes(name: str) -> bool:
    return name.startswith("new_") or name.endswith("_like") or name in ("set_", "resize_")


def inputs(name: str, schema: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Yields the tensors that an operation reads or writes. A view does neither."""
    for argument, value in zip_arguments(schema, args, kwargs):
        alias = argument.alias_info
        if (alias is None or alias.is_write) and not reads_sizes(name):
            yield from ((x, alias is not None) for x in tensors(value))


def outputs(
    name: str, given: list[Tensor], made: list[Tensor], on_card: bool
) -> Iterator[tuple[Tensor, bool]]:
    """Yields the new tensors of an operation, which it writes unless they are empty."""
    storages = {x.untyped_storage()._cdata for x in given}
    for x in made:
        if x.untyped_storage()._cdata not in storages:
            DETECTOR.storage(x, here() if on_card else HOST)
            if not name.startswith(("empty", "new_empty")):
                yield x, WRITE


@contextmanager
def watching(without: Iterable[str] = ()) -> Generator[set[tuple[Access, Access]]]:
    """Yields the reports on this process. The waits of the functions in `without`, "file.py function", do nothing."""
    DETECTOR.reset()
    left_out.update(without)
    DETECTOR.on = True
    try:
        with Methods(), Operations():
            yield DETECTOR.reports
        assert taken_out == left_out, f"no wait in {left_out - taken_out}"
    finally:
        DETECTOR.on = False
        left_out.clear()
        taken_out.clear()
