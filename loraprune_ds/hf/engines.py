"""Chooses the engine of a training by what holds its weights: ZeRO-3's shards, or each process by itself."""

from typing import Any

import torch
from torch import nn

from loraprune_ds.engine.torch_state import check_optimizer
from loraprune_ds.engine.watched_model import check_private_names
from loraprune_ds.errors import require
from loraprune_ds.hf.live import find_peft_model, live_shape
from loraprune_ds.local.model import PRIVATE, LocalModel
from loraprune_ds.pruning.prunable_model import PrunableModel


def find_engine(
    model: nn.Module, optimizer: Any, ds_config: dict[str, Any] | None
) -> PrunableModel:
    """Connects the pruner with the weights and the optimizer of a training. Raises UserError if they cannot be cut."""
    peft_model = find_peft_model(model)
    # of DeepSpeed's engine. PEFT's has another type
    ds_config = ds_config or getattr(model, "config", None)
    inner = unwrapped(optimizer)
    if isinstance(ds_config, dict) or is_deepspeed(inner):
        from loraprune_ds.zero.ds_config import check_reshardable  # DeepSpeed, once it is needed
        from loraprune_ds.zero.external_engine import share_model

        if isinstance(ds_config, dict):
            check_reshardable(
                "the DeepSpeed config",
                ds_config,
                {p.element_size() for p in peft_model.parameters()},
            )
        return share_model(peft_model, inner, live_shape(peft_model))
    kind = type(model).__name__
    replicated = not isinstance(model, nn.DataParallel) and not kind.startswith(
        ("FSDP", "FullySharded")
    )
    require(replicated, f"{kind} cannot be cut; use DistributedDataParallel or DeepSpeed ZeRO-3")
    devices = sorted({str(parameter.device) for parameter in peft_model.parameters()})
    require(
        len(devices) == 1,
        f"the model is spread over {', '.join(devices)}; load it onto one device, or use ZeRO-3",
    )
    halves = {
        p.dtype for n, p in peft_model.named_parameters() if ".lora_" in n and p.requires_grad
    } - {torch.float32}
    lost = f"LoRA is in {', '.join(map(str, halves))} without ZeRO-3's fp32 copies, so small updates would be lost"
    require(not halves, f"{lost}; call get_peft_model with autocast_adapter_dtype=True")
    check_private_names(PRIVATE)
    check_optimizer(inner)
    return LocalModel(peft_model, live_shape(peft_model), inner, getattr(optimizer, "scaler", None))


def unwrapped(optimizer: Any) -> Any:
    """Returns DeepSpeed's or torch's optimizer under the wrappers of accelerate."""
    while hasattr(optimizer, "optimizer") and not is_deepspeed(optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def is_deepspeed(optimizer: Any) -> bool:
    """Returns whether the optimizer is DeepSpeed's, without an import of DeepSpeed."""
    return type(optimizer).__module__.startswith("deepspeed.")
