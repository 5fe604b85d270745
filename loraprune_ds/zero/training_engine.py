"""DeepSpeed's engine for our own training loop, and the training state of a checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.collect import collect_tensor
from loraprune_ds.zero.device import accelerator, empty_host_cache, settle_shards
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import free_shards, overwrite_shard, pad
from loraprune_ds.zero.private import LOSS_SCALE_FIELDS
from loraprune_ds.zero.sharded import ShardedModel

# (layer, tensor name, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, int, int], Tensor]


class TrainingEngine:
    """Trains the sharded `model` through `deepspeed`, a `DeepSpeedEngine`. Every method is collective."""

    def __init__(self, deepspeed: Any, shape: ModelShape) -> None:
        self.deepspeed = deepspeed
        self.model = ShardedModel(deepspeed.module, deepspeed.optimizer, shape, deepspeed.empty_partition_cache)

    @property
    def learning_rate(self) -> float:
        return float(self.deepspeed.get_lr()[0])

    def forward(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss`: its share of the step's loss."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """Counts a micro-batch. Call it after every micro-batch of a step except the last."""
        self.deepspeed.step()  # only counts, because this is not a boundary

    def update(self, *, skipped: bool) -> float | None:
        """Makes the update, unless fp16 has `skipped` it. Returns the gradient norm before clipping, or None."""
        optimizer_step(self.deepspeed, skipped=skipped)
        settle_shards()  # orders the updated shards of LoRA before the next forward pass gathers them
        norm = None if skipped else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode. It does not change what training gathers."""
        # DeepSpeed caches which weights to free after which module. After an evaluation its decisions would make
        # every later step gather weights twice. DeepSpeed caches nothing while it records a pass.
        self.model.forget_trace()
        self.deepspeed.eval()
        with torch.no_grad():
            outputs = self.deepspeed(**inputs)
        self.deepspeed.train()
        self.model.forget_trace()
        return outputs

    def release(self) -> None:
        """Frees the model and its optimizer, even if they are still referenced. The engine is unusable afterwards."""
        release(self.deepspeed)


def optimizer_step(engine: Any, *, skipped: bool) -> None:
    """Makes the update and sets the next learning rate. The schedule counts skipped steps, DeepSpeed does not."""
    engine.step()
    if skipped:
        engine.lr_scheduler.step()


def release(engine: Any) -> None:
    """Frees the weights and the optimizer's state. The engine cannot be used afterwards."""
    # Dropping the engine frees nothing: a global list and a class's cache in DeepSpeed hold every module that ran, and
    # every parameter holds the optimizer.
    engine.empty_partition_cache()
    engine.destroy()  # removes the hooks and waits for the device
    free_shards(engine.module)
    zero = engine.optimizer
    if inner := vars(zero).get("optimizer"):  # an engine for inference has none
        inner.state.clear()
    vars(zero).clear()  # masters, gradients, buckets and flat copies, under any name
    accelerator().empty_cache()
    empty_host_cache()


def collect_lora_state(model: ShardedModel, layer: int, owner: int) -> dict[str, Tensor] | None:
    """Gathers a layer's state on rank `owner`, as "{linear}.lora_A.master". Returns None elsewhere. Collective."""
    state = model.optimizer_state
    tensors = {}
    for name, parameter in model.lora_parameters(layer).items():
        for key in state.keys():
            tensor = collect_tensor(parameter, owner, model.comm, state.shard(parameter, key))
            if tensor is not None:
                tensors[f"{name}.{key}"] = tensor
    return tensors if model.rank == owner else None


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
                shard = pad(read(layer, f"{name}.{key}", start, end).to(model.device), numel, model.world_size)
                state.shard(parameter, key).copy_(shard)
                if key == "master":
                    overwrite_shard(parameter, shard)
    settle_shards()  # orders the restored shards of LoRA before the first gather


def adam_step(model: ShardedModel) -> int:
    states = list(model.zero_optimizer.optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def counters(engine: TrainingEngine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the states of the learning-rate schedule and of fp16's loss scaler, both for JSON."""
    scaler = engine.model.zero_optimizer.loss_scaler
    loss_scale = {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS if scaler.dynamic}
    return engine.deepspeed.lr_scheduler.state_dict(), loss_scale


def restore_counters(engine: TrainingEngine, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]) -> None:
    """Restores the schedule, the loss scale and DeepSpeed's step counts."""
    deepspeed = engine.deepspeed
    deepspeed.lr_scheduler.load_state_dict(schedule)
    for group, rate in zip(deepspeed.optimizer.param_groups, deepspeed.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    for name, value in loss_scale.items():
        setattr(deepspeed.optimizer.loss_scaler, name, value)
    deepspeed.global_steps = step
    deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()
    deepspeed.global_samples = step * deepspeed.train_batch_size()
