"""Starts a rank of DeepSpeed on the virtual card: its accelerator, and collectives like NCCL's.

Asynchronous collectives run on a stream of their group until `wait`, others on the current stream.
"""

import functools
import inspect
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from loraprune_ds.ranks import device
from tests.streams import virtual_card as card
from tests.streams.detector import READ, WRITE
from tests.streams.virtual_card import CARD, DETECTOR
from tests.support.ranks import RENAMED, start_deepspeed

# Which arguments they read, and which they write.
COLLECTIVES = {
    **dict.fromkeys(("all_reduce", "broadcast", "reduce"), ("tensor", "tensor")),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "reduce_scatter_tensor": ("input", "output"),
    "all_to_all_single": ("input", "output"),
    "gather": ("tensor", "gather_list"),
    "scatter": ("scatter_list", "tensor"),
}


class Work:
    """The handle of an asynchronous collective. NCCL keeps its tensors until `wait`."""

    def __init__(self, work: Any, stream: int, held: list[Any]) -> None:
        self.work, self.held = work, held
        DETECTOR.order.record_state(id(self), stream)

    def wait(self, *args: Any) -> Any:
        with _disable_current_modes():
            result = self.work.wait(*args)
        if not card.is_left_out():
            DETECTOR.order.stream_wait_for_event(card.here(), id(self))
        self.held = []
        return result


def collective(
    function: Any, signature: Any, reads: str, writes: str, *args: Any, **kwargs: Any
) -> Any:
    if not DETECTOR.on:
        return function(*args, **kwargs)
    given = signature.bind(*args, **kwargs).arguments
    used = ((given.get(reads), READ), (given.get(writes), WRITE))
    accesses = [
        (x, access) for values, access in used for x in card.tensors(values) if card.is_card(x)
    ]
    with _disable_current_modes():  # gloo copies
        work = function(*args, **kwargs)
    if work is None:
        DETECTOR.launch(card.here(), function.__name__, accesses)
        return None
    stream = id(kwargs.get("group"))
    DETECTOR.wait(stream, card.here())
    DETECTOR.launch(stream, function.__name__, accesses)
    return Work(work, stream, accesses)


def start_on_card(rank: int, world_size: int, folder: Path) -> None:
    """Makes this process a rank with a virtual card, for `RankPool`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.Tensor.record_stream = card.record_stream  # type: ignore[method-assign]  # it takes only torch's streams
    for name, places in COLLECTIVES.items():
        function = getattr(torch.distributed, name)
        given = (function, inspect.signature(function), *places)
        setattr(
            torch.distributed,
            name,
            functools.wraps(function)(functools.partial(collective, *given)),
        )
    for new, old in RENAMED.items():
        setattr(torch.distributed, new, getattr(torch.distributed, old))
    # only here: DeepSpeed must see these collectives
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    made = functools.partial(torch.tensor, device=CARD)
    answers = {
        "Stream": card.Stream,
        # only throttles DeepSpeed, and orders nothing here
        "Event": lambda *_, **__: Mock(query=lambda: False),
        "stream": lambda _, stream: stream or card.streams[-1],
        "current_stream": lambda *_: card.streams[-1],
        "default_stream": lambda *_: card.streams[0],
        "synchronize": card.synchronize,
        "is_synchronized_device": lambda _: False,
        "device_name": lambda *_: str(CARD),
        "current_device_name": lambda *_: str(CARD),
        "current_device": lambda _: 0,
        "device_count": lambda _: world_size,
        "on_accelerator": lambda _, tensor: card.is_card(tensor),
        "pin_memory": lambda _, tensor, *__, **___: card.pin_memory(tensor),
        "_torch_empty_pinned": lambda _, tensor, shape: card.pin_memory(tensor.new_empty(shape)),
        "FloatTensor": property(lambda _: functools.partial(made, dtype=torch.float32)),
        "ByteTensor": property(lambda _: functools.partial(made, dtype=torch.uint8)),
    }
    device.is_cpu, device.current_device = lambda: False, lambda: CARD
    device.resident_bytes = device.reserved_bytes = device.peak_bytes = device.reset_peak = lambda: (
        0
    )
    set_accelerator(type("VirtualCard", (CPU_Accelerator,), answers)())
    start_deepspeed(rank, world_size, folder)
