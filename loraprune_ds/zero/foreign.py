"""A ZeRO-3 engine of another trainer: finds it, checks that it can be pruned, and watches its updates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from loraprune_ds.errors import UserError
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.private import check_private_attributes
from loraprune_ds.zero.sharded import ShardedModel

ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")  # state with a shape: exp_avg and exp_avg_sq alone


def find_zero_optimizer(optimizer: Any) -> DeepSpeedZeroOptimizer_Stage3:
    """Finds DeepSpeed's stage-3 optimizer under the wrappers of accelerate. Raises UserError if there is none."""
    found = optimizer
    while found is not None and not isinstance(found, DeepSpeedZeroOptimizer_Stage3):
        found = getattr(found, "optimizer", None)
    if found is None:
        raise UserError(
            f"pruning needs DeepSpeed ZeRO-3 (zero_optimization.stage 3); the optimizer is {type(optimizer).__name__}"
        )
    return found


def share_model(module: nn.Module, zero: DeepSpeedZeroOptimizer_Stage3, shape: ModelShape) -> ShardedModel:
    """Makes the model that the pruner cuts while the other trainer's engine trains it.

    Raises:
        UserError: the engine's optimizer or group of ranks cannot be pruned, or this version of DeepSpeed.
    """
    check_private_attributes()
    inner = zero.optimizer
    if type(inner).__name__ not in ADAM or any(group.get("amsgrad") for group in inner.param_groups):
        name = f"{type(inner).__name__}{' with amsgrad' if type(inner).__name__ in ADAM else ''}"
        raise UserError(f"the optimizer state of {name} cannot be cut along with LoRA; use one of {', '.join(ADAM)}")
    shards, ranks = dist.get_world_size(zero.dp_process_group), dist.get_world_size()
    if shards != ranks:
        raise UserError(f"ZeRO-3 shards over {shards} of {ranks} ranks; tensor and pipeline parallelism cannot be cut")
    return ShardedModel(module, zero, shape, zero.empty_partition_cache)


def reduced_dtypes(zero: DeepSpeedZeroOptimizer_Stage3) -> set[torch.dtype]:
    """Returns the dtypes in which gradients travel between the ranks and add up over micro-batches."""
    return {zero.communication_data_type, zero.gradient_accumulation_dtype}


def gradient_norm(zero: DeepSpeedZeroOptimizer_Stage3) -> float:
    """Returns the norm of all gradients at the last update, before clipping."""
    return float(zero._global_grad_norm)


def before_each_update(zero: DeepSpeedZeroOptimizer_Stage3, action: Callable[[], None]) -> Callable[[], None]:
    """Runs `action` right before each update, where gradients are averaged and not yet clipped. Returns an undo."""
    step = zero.step

    def act_and_step(*args: Any, **kwargs: Any) -> Any:
        action()
        return step(*args, **kwargs)

    zero.step = act_and_step
    return partial(setattr, zero, "step", step)
