"""Trains with transformers and TRL on CPU ranks of FSDP2. accelerate 1.15 would make DDP of them without a word."""

import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from loraprune_ds import LoraPruneCallback, PruneConfig, errors
from tests.support import trainers
from tests.support.driver import Job
from tests.support.launching import ROOT
from tests.support.trainers import PLAIN, Setup, fresh_accelerate


def fsdp(**config: Any) -> dict[str, Any]:
    """Returns the arguments of a training under FSDP2, with these keys of its config."""
    return {"deepspeed": None, "fsdp": True, "fsdp_config": {"version": 2, **config}}


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Makes accelerate do for CPU ranks what it does for cards.

    The second state is for a later `AcceleratorState()`, which copies it. Without it a save has half of the tensors.
    """
    plain = AcceleratorState.__init__

    def with_fsdp(state: Any, *given: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        plain(state, *given, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is None or state.distributed_type != DistributedType.MULTI_CPU:
            return
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if state._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(state._mixed_precision)
        state.fsdp_plugin = fsdp_plugin

    with patch.object(AcceleratorState, "__init__", with_fsdp):
        yield


class IsSharded(TrainerCallback):
    """Checks that the model of a training is FSDP2's."""

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        assert any("layers.1" in name for name in units), units


def train_with_callback(
    job: Job, out: Path, more: dict[str, Any], checkpoint: str | None = None, setup: Setup = PLAIN
) -> tuple[list[Any], dict[str, Any]]:
    """Trains under FSDP2 as `trainers.train_with_callback` does."""
    make = trainers.make_trainer

    def make_sharded(*given: Any, **settings: Any) -> Any:
        trainer = make(*given, **settings)
        trainer.add_callback(IsSharded())
        return trainer

    with fsdp_on_cpu(), patch.object(trainers, "make_trainer", make_sharded):
        return trainers.train_with_callback(job, out, more, checkpoint, setup)


def resume_without_the_callback(job: Job, out: Path, more: dict[str, Any], checkpoint: str) -> str:
    """Goes on from a checkpoint without `resume`. Returns the error."""
    with fsdp_on_cpu():
        return trainers.resume_without_the_callback(job, out, more, checkpoint)


def evaluate_save_and_train(job: Job, out: Path, more: dict[str, Any]) -> list[int]:
    """Shards, evaluates and saves a model, then trains it. Returns the steps of the cuts."""
    with fresh_accelerate(), fsdp_on_cpu():
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        trainer = trainers.make_trainer(job, trainers.arguments(job, out, **more), callback)
        # accelerate shards no model without its optimizer
        optimizer = trainer.create_optimizer()
        trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
        trainer.model_wrapped = trainer.model
        trainer.evaluate()
        trainer.accelerator.get_state_dict(trainer.model)  # whole
        trainer.accelerator.save_state(str(out / "state"))
        trainer.train()
        return [cut.step for cut in callback.cuts]


def kill_within_a_save(job: Job, out: Path, more: dict[str, Any]) -> None:
    """Trains under FSDP2 until rank 1 is killed in the callback's part of the second save."""
    with patch.object(errors, "FAULT", "save.pruning_written@2:1:9"):
        train_with_callback(job, out, more)


def run_example(script: str, argv: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Runs a script of launch/examples as `__main__`. Returns the live model's logits (samples, tokens, vocabulary)."""
    with fresh_accelerate(), fsdp_on_cpu(), patch.object(sys, "argv", [script, *argv]):
        PartialState(backend="gloo", cpu=True)
        names = runpy.run_path(str(ROOT / "launch" / "examples" / script), run_name="__main__")
        model = names["trainer"].model_wrapped if "trainer" in names else names["model"]
        assert sum(isinstance(module, FSDPModule) for module in model.modules()) > 2
        model.eval()
        with torch.no_grad():
            return model(input_ids=ids).logits.float().clone()
