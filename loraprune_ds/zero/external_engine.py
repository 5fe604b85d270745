"""Connects the pruner with the ZeRO-3 engine of another trainer."""

import logging
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import FP32_FLAT_GROUPS, LOSS_SCALER, OPTIMIZER_STATE_DICT
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

from loraprune_ds.engine.optimizer_state import ADAM, optimizer_kind
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.zero.private import check_private_attributes
from loraprune_ds.zero.sharded import ShardedModel

LATEST = "latest"  # names the folder of the newest state
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


def can_load(folder: Path, rank: int) -> bool:
    """Tells whether a checkpoint has the files that DeepSpeed loads on this rank."""
    latest = folder / LATEST
    if not latest.is_file():
        return False
    tag = folder / latest.read_text().strip()
    name = _rank_name(rank)
    return all(any(tag.glob(f"*{name}_{kind}_states.pt")) for kind in ("model", "optim"))


def _rank_name(rank: int) -> str:
    """Returns what the names of a rank's files have in common."""
    return f"zero_pp_rank_{rank}_mp_rank_00"


def write_stand_in(folder: Path, step: int, groups: list[JsonObject], comm: Communicator) -> None:
    """Writes this rank's files of a checkpoint that DeepSpeed loads without a change of weights or moments.

    Args:
        groups: Adam's, without parameters. DeepSpeed takes their numbers.
    """
    tag = folder / f"global_step{step}"
    rank_name = _rank_name(comm.rank)
    tag.mkdir()
    (folder / LATEST).write_text(tag.name)
    counts = {
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": comm.world_size,
        "mp_world_size": 1,
    }
    torch.save({"module": {}, **counts}, tag / f"{rank_name}_model_states.pt")
    adam = {
        "state": {},
        "param_groups": [group | {"params": [i]} for i, group in enumerate(groups)],
    }
    zero = {
        LOSS_SCALER: LossScaler(1),
        "dynamic_loss_scale": False,
        "overflow": False,
        OPTIMIZER_STATE_DICT: adam,
        FP32_FLAT_GROUPS: [],
    }
    for prefix in ("", "bf16_"):
        torch.save({OPTIMIZER_STATE_DICT: zero}, tag / f"{prefix}{rank_name}_optim_states.pt")
