"""A step makes the host wait for the device once, beside DeepSpeed and what protects new shards.

A CPU never waits. So calls are counted that would wait on a device, by the function of ours or of DeepSpeed that makes
them. What only reads tensors of the host is named, too.
"""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.zero.device import accelerator
from tests.numerics.driver import Job, build, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default)
METHODS = ("tolist", "cpu", "numpy")
OTHERS = ("deepspeed/", "transformers/")

ONCE = "train/trainer.py:_exchange"
SETTLES = "zero/device.py:settle_shards"
SETTLED = ("zero/training_engine.py:update", "pruning/importance.py:check")  # the norm, and whether scores are finite
THEIRS = {
    "transformers/masking_utils.py:find_packed_sequence_indices": 2,  # once per micro-batch: are samples packed?
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": 1,
    "deepspeed/runtime/zero/stage3.py:step_with_gradscaler": 1,  # clipping. On a device its streams wait besides
}
HOST = (
    "train/data/samples.py",  # ids and labels
    "train/data/order.py",
    "model/token_loss.py:supervised_positions",  # of labels that are on the host
)


def place() -> str | None:
    """Names the innermost function of the package, of DeepSpeed or of transformers that is running."""
    for frame in reversed(traceback.extract_stack(sys._getframe(1))):
        for package in ("loraprune_ds/", *OTHERS):
            _, found, inside = frame.filename.rpartition(f"/{package}")
            if found:
                return f"{package if package in OTHERS else ''}{inside}:{frame.name}"
    return None


class Reads(TorchDispatchMode):
    """Tells of each operation whose result the host must know."""

    def __init__(self, tell: Callable[[], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func in READS:
            self.tell()
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yields the places that would wait for a device, in the order of the calls."""
    places: list[str] = []

    def tell() -> None:
        if (name := place()) is not None:
            places.append(name)

    def telling(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tell()
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(patch.object(Tensor, name, telling(getattr(Tensor, name))))
        stack.enter_context(patch.object(accelerator(), "synchronize", telling(accelerator().synchronize)))
        stack.enter_context(Reads(tell))
        yield places


def places_of_a_step(job: Job) -> list[str]:
    """Returns those of the third step, which scores, follows the record of the modules' order and cuts nothing."""
    trainer = build(job)
    for step in (1, 2):
        trainer.step(step)
        trainer.cut(step)
    with waits() as places:
        trainer.step(3)
        trainer.cut(3)
    return places


def test_a_step_waits_once(ranks: RankPool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "ffn": 40}
    model = make_tiny_llama(tmp_path / "model", layers=3, vocab=97, seed=1, **sizes)
    adapter = write_adapter(tmp_path / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=4, samples=8, tokens=12, vocab=97, seed=3)
    prune = {"ratio": 0.2, "prune_every": 4, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    for places in ranks.run(2, places_of_a_step, Job(model, adapter, batches, prune, max_grad_norm=1.0)):
        ours = [p for p in places if not p.startswith((*OTHERS, *HOST))]
        assert ours == [ONCE, SETTLES, *SETTLED]  # in this order: what reads after the wait costs no second one
        assert {p: places.count(p) for p in places if p.startswith(OTHERS)} == THEIRS
