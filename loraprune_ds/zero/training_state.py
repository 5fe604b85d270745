"""The LoRA training state in and out of the engine, independent of the number of ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear, lora_weights
from loraprune_ds.model.shapes import LINEARS
from loraprune_ds.zero.collect import collect_tensor
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import overwrite_piece, pad
from loraprune_ds.zero.private import LOSS_SCALE_FIELDS
from loraprune_ds.zero.sharded import ShardedStore

# (layer, tensor name, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, int, int], Tensor]


def collect_lora_state(store: ShardedStore, layer: int, owner: int) -> dict[str, Tensor] | None:
    """fp32 masters and Adam moments of a layer's LoRA on rank `owner`, as "{linear}.lora_A.master"; None elsewhere."""
    state = store.optimizer_state()
    tensors = {}
    for name, parameter in _lora_parameters(store, layer):
        for key in state.keys():
            whole = collect_tensor(store, parameter, owner, state.piece(parameter, key))
            if whole is not None:
                tensors[f"{name}.{key}"] = whole
    return tensors if store.rank == owner else None


@torch.no_grad()
def restore_lora_state(store: ShardedStore, read: ReadState, adam_step: int) -> None:
    """Every rank reads the pieces it owns; the parameters' low-precision copies follow their masters."""
    state = store.optimizer_state()
    if adam_step:
        state.create_moments(adam_step)
    for layer in range(len(store.layers)):
        for name, parameter in _lora_parameters(store, layer):
            numel: int = parameter.ds_numel  # type: ignore[attr-defined]
            start, end = owned_range(numel, store.world_size, store.rank)
            for key in state.keys():
                piece = pad(read(layer, f"{name}.{key}", start, end).to(store.device), numel, store.world_size)
                state.piece(parameter, key).copy_(piece)
                if key == "master":
                    overwrite_piece(parameter, piece)


def adam_step(store: ShardedStore) -> int:
    """Updates Adam has made so far."""
    states = list(store.engine.optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def counters(store: ShardedStore) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state of the learning-rate schedule, state of fp16's loss scaler), both JSON."""
    scaler = store.engine.optimizer.loss_scaler
    loss_scale = {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS if scaler.dynamic}
    return store.engine.lr_scheduler.state_dict(), loss_scale


def restore_counters(store: ShardedStore, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]) -> None:
    """Puts the schedule, the loss scale and DeepSpeed's own step counts where they were."""
    engine = store.engine
    engine.lr_scheduler.load_state_dict(schedule)
    for group, rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name, value in loss_scale.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()


def _lora_parameters(store: ShardedStore, layer: int) -> list[tuple[str, nn.Parameter]]:
    named = []
    for linear in LINEARS:
        a, b = lora_weights(lora_linear(store.layers[layer], linear))
        named += [(f"{linear.name}.lora_A", a), (f"{linear.name}.lora_B", b)]
    return named
