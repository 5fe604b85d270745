"""The host's part of a step: gathers, FLOPs, and calls that would wait for the device (a CPU never waits)."""

import dataclasses
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.model.shape import LinearId
from loraprune_ds.zero import params
from loraprune_ds.zero.device import accelerator
from loraprune_ds.zero.gathering import forget_trace
from loraprune_ds.zero.shards import FlatShards
from tests.support.cutting import recorded_collectives
from tests.support.driver import Job, ShardedTrainer, build, tiny_job
from tests.support.ranks import RankPool

# The record of the modules' order outlives a cut, and equals a new recording


def record_of(trainer: ShardedTrainer) -> list[tuple[int, int]]:
    """Returns (parameter, position) of all that is prefetched, in order."""
    coordinator = trainer.model.zero_optimizer.parameter_offload.get_param_coordinator()
    assert coordinator.is_complete_trace()
    order = coordinator._PartitionedParameterCoordinator__param_order
    return [(use.param.ds_id, use.step_id_last_used_at) for use in order]


def gathers(trainer: ShardedTrainer, step: int) -> list[int]:
    """Makes a step. Returns the elements of its all-gathers before the reports, in order."""
    with recorded_collectives() as calls:
        trainer.step(step)
    return [numel for name, numel in calls if name == "all_gather_into_tensor"]


def train_on_a_kept_record(job: Job) -> dict[str, Any]:
    """Cuts after each of the first three steps. DeepSpeed records again after the fourth, and after an evaluation."""
    trainer, recordings = build(job), 0
    construct = PartitionedParameterCoordinator.construct_parameter_trace_from_module_trace

    def counting(self: Any) -> None:
        nonlocal recordings
        recordings += 1
        construct(self)

    cuts = 0
    with patch.object(
        PartitionedParameterCoordinator, "construct_parameter_trace_from_module_trace", counting
    ):
        for step in (1, 2, 3):
            trainer.step(step)
            cuts += trainer.cut(step) is not None
        after_cut = gathers(trainer, 4)
        kept, while_kept = record_of(trainer), recordings
        forget_trace(trainer.engine.optimizer)
        trainer.step(5)
        fresh = gathers(trainer, 6)
        again, while_again = record_of(trainer), recordings
        undo = trainer.model.before_each_update(lambda: None)  # as in a loop of another trainer
        trainer.engine.deepspeed.eval()
        trainer.engine.deepspeed(**trainer.samples.inputs(trainer.order.batch(0)))
        trainer.step(7)
        undo()
    return {
        "cuts": cuts,
        "recordings": (while_kept, while_again, recordings),
        "same_record": kept == again,
        "same_gathers": after_cut == fresh,
    }


def test_a_cut_costs_no_new_recording(ranks: RankPool, tmp_path: Path) -> None:
    prune = {"ratio": 0.3, "prune_every": 1, "warmup_fraction": 0.0, "cooldown_fraction": 0.5}
    job = tiny_job(tmp_path, prune, model={"layers": 4}, steps=7, samples=4)
    # with one micro-batch the first cut comes before the record is complete
    for micro_batch_size in (1, 2):
        for result in ranks.run(
            2, train_on_a_kept_record, dataclasses.replace(job, micro_batch_size=micro_batch_size)
        ):
            assert result == {
                "cuts": 3,
                "recordings": (1, 2, 3),
                "same_record": True,
                "same_gathers": True,
            }


# Whatever writes shards waits for the device before it returns, so no side stream reads a half-written one


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
    ids = [LinearId(i, linear.linear) for i, linear in model.shape.input_linears([1])]

    def zeros(layer: int) -> dict[str, Tensor]:
        named = model.lora_parameters()[layer].items()
        return {name: torch.zeros(model.layout.full_shape(parameter)) for name, parameter in named}

    with (
        patch.object(params, "_install", watched.writing(params._install)),
        patch.object(FlatShards, "write", watched.writing(FlatShards.write)),
        patch.object(DeepSpeedEngine, "step", watched.writing(DeepSpeedEngine.step)),
        patch.object(accelerator(), "synchronize", watched.settle),
    ):
        return {
            "update": watched.after(lambda: trainer.step(1)),
            "cut": watched.after(lambda: trainer.cut(1)),
            "refit": watched.after(
                lambda: model.replace_weights(ids, lambda _, linear: linear.weight)
            ),
            "restore": watched.after(
                lambda: model.optimizer_state.restore(model.lora_parameters(), zeros)
            ),
        }


def test_every_write_of_shards_ends_with_a_wait(ranks: RankPool, tmp_path: Path) -> None:
    job = tiny_job(
        tmp_path, {"ratio": 0.2, "warmup_fraction": 0, "cooldown_fraction": 0}, steps=1, samples=4
    )
    for seen in ranks.run(2, watch, job):
        assert seen == dict.fromkeys(("update", "cut", "refit", "restore"), (True, True))


# A step makes the host wait for the device once, besides DeepSpeed and what protects new shards

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
)
METHODS = ("tolist", "cpu", "numpy")
OTHERS = ("deepspeed/", "transformers/")

ONCE = "session/exchange.py:exchange_numbers"
SETTLES = "zero/device.py:settle_shards"
HOST = (
    "train/data/samples.py",  # ids and labels
    "train/data/samples.py",
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
        by_mask = func is aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
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
        stack.enter_context(
            patch.object(accelerator(), "synchronize", telling(accelerator().synchronize))
        )
        stack.enter_context(Reads(tell))
        yield places


def places_of_a_step(job: Job) -> list[str]:
    """Returns the places of the third step, which scores, follows the record of the modules' order and cuts nothing."""
    trainer = build(job)
    for step in (1, 2):
        trainer.step(step)
        trainer.cut(step)
    with waits() as places:
        trainer.step(3)
        trainer.cut(3)
    return places


def test_a_step_waits_once(ranks: RankPool, tmp_path: Path) -> None:
    prune = {"ratio": 0.2, "prune_every": 4, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    job = tiny_job(tmp_path, prune, steps=4, samples=8, max_grad_norm=1.0)
    for places in ranks.run(2, places_of_a_step, job):
        ours = [p for p in places if not p.startswith((*OTHERS, *HOST))]
        assert ours == [ONCE, SETTLES]
