"""Whatever writes shards waits for the device before it returns, so that no side stream reads a half-written one.

A CPU has no streams. So the calls are watched: the last one of each must come after the last write.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from loraprune_ds.zero import collect, params, training_engine
from loraprune_ds.zero.device import accelerator
from loraprune_ds.zero.training_engine import restore_lora_state
from tests.numerics.driver import Job, build, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool


@dataclass
class Watched:
    """Holds if shards were written, and if the device was waited for since."""

    wrote: bool = False
    settled: bool = True

    def writing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.wrote, self.settled = True, False
            return result

        return write

    def settle(self, *_: Any) -> None:
        self.settled = True

    def after(self, action: Callable[[], Any]) -> tuple[bool, bool]:
        self.wrote, self.settled = False, True
        action()
        return self.wrote, self.settled


def watch(job: Job) -> dict[str, tuple[bool, bool]]:
    trainer, watched = build(job), Watched()
    model = trainer.model
    ids = model.shape.input_linear_ids([1])

    def zeros(layer: int, name: str, start: int, end: int) -> Tensor:
        return torch.zeros(end - start)

    with (
        mock.patch.object(params, "_install", watched.writing(params._install)),
        mock.patch.object(collect, "overwrite_shard", watched.writing(params.overwrite_shard)),
        mock.patch.object(training_engine, "overwrite_shard", watched.writing(params.overwrite_shard)),
        mock.patch.object(training_engine, "optimizer_step", watched.writing(training_engine.optimizer_step)),
        mock.patch.object(accelerator(), "synchronize", watched.settle),
    ):
        return {
            "update": watched.after(lambda: trainer.step(1)),
            "cut": watched.after(lambda: trainer.cut(1)),
            "refit": watched.after(lambda: model.replace_weights(ids, lambda _, linear: linear.weight)),
            "restore": watched.after(lambda: restore_lora_state(model, zeros, 1)),
        }


def test_every_write_of_shards_ends_with_a_wait(ranks: RankPool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "ffn": 40}
    model = make_tiny_llama(tmp_path / "model", layers=3, vocab=97, seed=1, **sizes)
    adapter = write_adapter(tmp_path / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=1, samples=4, tokens=12, vocab=97, seed=3)
    job = Job(model, adapter, batches, {"ratio": 0.2, "warmup_fraction": 0, "cooldown_fraction": 0})
    for seen in ranks.run(2, watch, job):
        assert seen == dict.fromkeys(("update", "cut", "refit", "restore"), (True, True))
