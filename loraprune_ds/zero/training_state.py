"""Takes the training state of LoRA out of the engine and puts it back. The number of ranks may differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear, lora_weights
from loraprune_ds.zero.collect import collect_tensor
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import overwrite_shard, pad
from loraprune_ds.zero.private import LOSS_SCALE_FIELDS
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.training_engine import TrainingEngine

# (layer, tensor name, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, int, int], Tensor]


def collect_lora_state(model: ShardedModel, layer: int, owner: int) -> dict[str, Tensor] | None:
    """Gathers a layer's fp32 masters and Adam moments on rank `owner`. Returns None elsewhere. Collective.

    Names are like "{linear}.lora_A.master".
    """
    state = model.optimizer_state()
    tensors = {}
    for name, parameter in _lora_parameters(model, layer):
        for key in state.keys():
            whole = collect_tensor(parameter, owner, model.comm, state.shard(parameter, key))
            if whole is not None:
                tensors[f"{name}.{key}"] = whole
    return tensors if model.rank == owner else None


@torch.no_grad()
def restore_lora_state(model: ShardedModel, read: ReadState, adam_step: int) -> None:
    """Reads the shards that this rank owns. The parameters' low-precision copies follow their masters."""
    state = model.optimizer_state()
    if adam_step:
        state.create_moments({"step": torch.tensor(float(adam_step))})
    for layer in range(len(model.layers)):
        for name, parameter in _lora_parameters(model, layer):
            numel: int = parameter.ds_numel  # type: ignore[attr-defined]
            start, end = owned_range(numel, model.world_size, model.rank)
            for key in state.keys():
                shard = pad(read(layer, f"{name}.{key}", start, end).to(model.device), numel, model.world_size)
                state.shard(parameter, key).copy_(shard)
                if key == "master":
                    overwrite_shard(parameter, shard)
    settle_shards()


def adam_step(model: ShardedModel) -> int:
    """Returns the number of updates that Adam has made."""
    states = list(model.zero_optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def counters(engine: TrainingEngine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the states of the learning-rate schedule and of fp16's loss scaler, both for JSON."""
    scaler = engine.model.zero_optimizer.loss_scaler
    loss_scale = {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS if scaler.dynamic}
    return engine.deepspeed.lr_scheduler.state_dict(), loss_scale


def restore_counters(engine: TrainingEngine, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]) -> None:
    """Puts the schedule, the loss scale and DeepSpeed's own step counts where they were."""
    deepspeed = engine.deepspeed
    deepspeed.lr_scheduler.load_state_dict(schedule)
    for group, rate in zip(deepspeed.optimizer.param_groups, deepspeed.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name, value in loss_scale.items():
        setattr(deepspeed.optimizer.loss_scaler, name, value)
    deepspeed.global_steps = step
    deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()
    deepspeed.global_samples = step * deepspeed.train_batch_size()


def _lora_parameters(model: ShardedModel, layer: int) -> list[tuple[str, nn.Parameter]]:
    named = []
    for linear in model.shape.linears(layer):
        a, b = lora_weights(lora_linear(model.layers[layer], linear))
        named += [(f"{linear.name}.lora_A", a), (f"{linear.name}.lora_B", b)]
    return named
