"""Checks a model that FSDP2 has sharded for another trainer. A refusal is one line before step 1."""

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed import get_rank, get_world_size
from torch.distributed.tensor import DTensor, Replicate, Shard

from loraprune_ds.engine.torch_state import check_optimizer
from loraprune_ds.engine.watched_model import check_private_names
from loraprune_ds.errors import require
from loraprune_ds.fsdp.model import sharded_units
from loraprune_ds.fsdp.private import Slot, check_private_attributes, find_slots
from loraprune_ds.model.classes import decoder_layers

# FSDP2's own placements: shards, and under HSDP replicas of them
PLACEMENTS = ((Shard(0),), (Replicate(), Shard(0)))
ONE_DTYPE_BEFORE = "2.8"  # compared as versions
log = logging.getLogger(__name__)


def check_fsdp(module: nn.Module, optimizer: Any) -> None:
    """Checks a model that FSDP2 has sharded, and its optimizer. Raises UserError if they cannot be cut."""
    check_private_names(())
    check_private_attributes()
    check_optimizer(optimizer)
    units = sharded_units(module)
    for unit in units:
        unit.reshard()
    _check_parameters(module)
    slots = find_slots(units)
    _check_dtypes(slots)
    if get_rank() == 0:
        _warn_of_rounding(slots)


def _check_parameters(module: nn.Module) -> None:
    """Checks that each parameter that trains or is cut is sharded by rows, and over all ranks."""
    cut = {id(p) for layer in decoder_layers(module) for p in layer.parameters()}
    mesh = None
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            needed = parameter.requires_grad or id(parameter) in cut
            require(
                not needed,
                f"{name} is not sharded by FSDP2; apply fully_shard to every decoder layer, without ignored_params",
            )
            continue
        require(
            parameter.dtype == torch.float32 or not parameter.requires_grad,
            f"{name} trains in {parameter.dtype} without fp32 copies, so small updates would be lost; "
            "call get_peft_model with autocast_adapter_dtype=True",
        )
        require(
            tuple(parameter.placements) in PLACEMENTS,
            f"{name} is placed as {parameter.placements}; only shards of FSDP2 by rows can be cut, "
            "without tensor parallelism or a shard_placement_fn",
        )
        mesh = mesh or parameter.device_mesh
        require(
            parameter.device_mesh == mesh,
            f"{name} is on {parameter.device_mesh}, others on {mesh}; shard all parameters over the same ranks",
        )
        require(
            mesh.size() == get_world_size(),
            f"FSDP2 shards over {mesh.size()} of {get_world_size()} ranks; other parallelism cannot be cut",
        )


def _check_dtypes(slots: dict[nn.Parameter, Slot]) -> None:
    """Checks that a unit has one dtype, if torch needs that."""
    several = torch.__version__ >= ONE_DTYPE_BEFORE
    for slot in slots.values():
        dtypes = {param.sharded_param.dtype for param in slot.params}
        require(
            several or len(dtypes) == 1,
            f"torch {torch.__version__} shards only one dtype in a unit, but LoRA is in float32; install torch 2.8",
        )


def _warn_of_rounding(slots: dict[nn.Parameter, Slot]) -> None:
    """Warns if gradients are averaged in less than fp32."""
    policies = [slot.param.mp_policy for p, slot in slots.items() if p.requires_grad]
    reduced = {policy.reduce_dtype or policy.param_dtype for policy in policies}
    halves = sorted(str(dtype).removeprefix("torch.") for dtype in reduced - {None, torch.float32})
    if halves:
        log.warning(
            "gradients are averaged in %s, so scores depend on the number of ranks and micro-batches; give FSDP2 a "
            "MixedPrecisionPolicy with reduce_dtype=torch.float32",
            ", ".join(halves),
        )
