"""Connects the pruner with the ZeRO-3 engine of another trainer."""

import logging
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, LOSS_SCALER, OPTIMIZER_STATE_DICT
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from loraprune_ds.engine.optimizer_state import ADAM, optimizer_kind
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.zero.private import check_private_attributes
from loraprune_ds.zero.sharded import ShardedModel

log = logging.getLogger(__name__)


def share_model(module: nn.Module, zero: Any, shape: ModelShape) -> ShardedModel:
    """Wraps a model that another trainer trains, for the pruner. Raises UserError if it cannot be cut."""
    check_private_attributes()
    require(
        isinstance(zero, DeepSpeedZeroOptimizer_Stage3),
        f"pruning needs DeepSpeed ZeRO-3 (zero_optimization.stage 3); the optimizer is {type(zero).__name__}",
    )
    kind = optimizer_kind(zero.optimizer)
    require(
        kind == "Adam",
        f"the optimizer state of {kind} cannot be cut along with LoRA; use one of {', '.join(ADAM)}",
    )
    shards = dist.get_world_size(zero.dp_process_group)
    ranks = dist.get_world_size()
    require(
        shards == ranks,
        f"ZeRO-3 shards over {shards} of {ranks} ranks; tensor and pipeline parallelism cannot be cut",
    )
    reduced = {zero.communication_data_type, zero.gradient_accumulation_dtype}
    if reduced != {torch.float32} and dist.get_rank() == 0:
        log.warning(
            "gradients are averaged in %s, so scores depend on the number of ranks and micro-batches; write "
            '"communication_data_type": "fp32" and "data_types": {"grad_accum_dtype": "fp32"} in the DeepSpeed config',
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in reduced)),
        )
    return ShardedModel(module, zero, shape)


def write_stand_in(
    folder: Path, step: int, groups: list[JsonObject], loss_scale: JsonObject, comm: Communicator
) -> None:
    """Writes this rank's files of a checkpoint that DeepSpeed loads without a change of what trains.

    DeepSpeed takes its loss scaler and its groups.
    """
    tag = folder / f"global_step{step}"
    rank_name = f"zero_pp_rank_{comm.rank}_mp_rank_00"
    tag.mkdir()
    (folder / "latest").write_text(tag.name)
    counts = {
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": comm.world_size,
        "mp_world_size": 1,
    }
    # DeepSpeed's own schedules read one number. The true one comes when the training begins
    states = {"module": {}, "lr_scheduler": {"last_batch_iteration": 0}, **counts}
    torch.save(states, tag / f"{rank_name}_model_states.pt")
    scaler = LossScaler(1)
    if loss_scale.get("dynamic"):
        scaler = object.__new__(DynamicLossScaler)
        scaler.dtype = torch.float16
    vars(scaler).update(loss_scale)
    zero = {
        LOSS_SCALER: scaler,
        "dynamic_loss_scale": scaler.dynamic,
        "overflow": False,
        OPTIMIZER_STATE_DICT: {"state": {}, "param_groups": groups},
        FP32_FLAT_GROUPS: [],
    }
    for prefix in ("", "bf16_"):
        torch.save({OPTIMIZER_STATE_DICT: zero}, tag / f"{prefix}{rank_name}_optim_states.pt")
