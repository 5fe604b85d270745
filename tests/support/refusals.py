"""What a user reads when something is refused, and what spoils a folder so that it is."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.errors import UserError

Spoil = Callable[[Path], object]  # of a folder


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text, errors="surrogateescape")


def truncate(name: str, left: int = -9) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


def edit(name: str, **values: Any) -> Spoil:
    return lambda folder: (folder / name).write_text(
        json.dumps(json.loads((folder / name).read_text()) | values)
    )


def edit_tensors(
    act: Callable[[dict[str, Tensor]], object], name: str = "model.safetensors"
) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / name)
        act(tensors)
        save_file(tensors, folder / name, {"format": "pt"})

    return spoil


def merge_into(name: str) -> Spoil:
    """Merges a small LoRA of rank 2 into a linear."""

    def merge(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, columns = tensors[name].shape
        b = torch.randn(rows, 2, generator=generator)
        a = torch.randn(2, columns, generator=generator)
        tensors[name] += (1e-4 * b @ a).to(tensors[name].dtype)

    return edit_tensors(merge)


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Damages a file at this fraction of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@contextmanager
def full_disk() -> Iterator[None]:
    """Lets no file of this process grow, so each write fails like one on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(act: Callable[..., object], *given: Any, **settings: Any) -> str:
    """Returns the one line of the UserError."""
    with pytest.raises(UserError) as caught:
        act(*given, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def must_name(names: str, act: Callable[..., object], *given: Any, **settings: Any) -> None:
    """Checks that the one line of the UserError has these words: the key, file, layer or rank at fault."""
    message = refused(act, *given, **settings)
    assert all(name in message for name in names.split()), message
