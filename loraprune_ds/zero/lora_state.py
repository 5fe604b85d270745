"""LoRA's fp32 masters and Adam moments in a step, which is independent of the number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import collect_tensor, overwrite_shard, pad
from loraprune_ds.zero.sharded import ShardedModel

# (layer, "{linear}.lora_A", key of the state, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, str, int, int], Tensor]


def collect_lora_state(model: ShardedModel, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gathers a layer's state on its owner: masters by "{linear}.lora_A", moments by "{linear}.lora_A.exp_avg".

    Both are empty elsewhere. Collective.
    """
    state, masters, moments = model.optimizer_state, dict[str, Tensor](), dict[str, Tensor]()
    for name, parameter in model.lora_parameters(layer).items():
        for key in state.keys():
            tensor = collect_tensor(parameter, model.owner(layer), model.comm, state.shard(parameter, key))
            if tensor is not None:
                to, own = (masters, name) if key == "master" else (moments, f"{name}.{key}")
                to[own] = tensor
    return masters, moments


@torch.no_grad()
def restore_lora_state(model: ShardedModel, read: ReadState, adam_step: int) -> None:
    """Reads this rank's shards of the state. The low-precision parameters are set from their masters."""
    state = model.optimizer_state
    if adam_step:
        state.create_moments({"step": torch.tensor(float(adam_step))})
    for layer in range(len(model.layers)):
        for name, parameter in model.lora_parameters(layer).items():
            numel: int = parameter.ds_numel  # type: ignore[attr-defined]
            start, end = owned_range(numel, model.world_size, model.rank)
            for key in state.keys():
                shard = pad(read(layer, name, key, start, end).to(model.device), numel, model.world_size)
                state.shard(parameter, key).copy_(shard)
                if key == "master":
                    overwrite_shard(parameter, shard)
    settle_shards()  # orders the restored shards of LoRA before the first gather


def adam_step(model: ShardedModel) -> int:
    """Returns the updates that Adam has counted."""
    states = list(model.zero_optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0
