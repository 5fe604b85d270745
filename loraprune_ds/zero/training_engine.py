"""DeepSpeed's engine as our own training loop needs it, beside the model that it prunes."""

from typing import Any

import torch
from torch import Tensor

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.device import accelerator, empty_host_cache, settle_shards
from loraprune_ds.zero.loss_scale import optimizer_step
from loraprune_ds.zero.sharded import ShardedModel


class TrainingEngine:
    """Trains the sharded model through DeepSpeed's engine. Every method is collective.

    Attributes:
        deepspeed: the `DeepSpeedEngine`.
        model: the sharded model that it trains.
    """

    def __init__(self, deepspeed: Any, shape: ModelShape) -> None:
        self.deepspeed = deepspeed
        self.model = ShardedModel(deepspeed.module, deepspeed.optimizer, shape, deepspeed.empty_partition_cache)

    @property
    def learning_rate(self) -> float:
        """The rate of the next update."""
        return float(self.deepspeed.get_lr()[0])

    def forward(self, **inputs: Any) -> Any:
        """Returns the model's output in training."""
        return self.deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss` is its share of the step's loss."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """Counts a micro-batch. It is called after every one of a step but the last."""
        self.deepspeed.step()  # not a boundary: only counts

    def update(self, *, skipped: bool) -> float | None:
        """Makes the optimizer's update at the end of a step.

        Args:
            skipped: whether fp16's gradients overflowed.

        Returns:
            The norm of the gradients before clipping. None where the update was skipped or DeepSpeed has none.
        """
        optimizer_step(self.deepspeed, skipped=skipped)
        settle_shards()
        norm = None if skipped else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode. It does not change what training gathers.

        DeepSpeed decides which weights to free after which module. A cache of that outlives its record of the modules'
        order. An evaluation decides to free weights after the forward pass. With that every later step would gather
        them twice. Nothing is decided in a pass that is being recorded.
        """
        self.model.forget_trace()
        self.deepspeed.eval()
        with torch.no_grad():
            outputs = self.deepspeed(**inputs)
        self.deepspeed.train()
        self.model.forget_trace()
        return outputs

    def release(self) -> None:
        """Frees the model and its optimizer, even if something still refers to them. The engine is of no use then."""
        release(self.deepspeed)


def release(engine: Any) -> None:
    """Frees the weights and all that an optimizer has beside them. The engine is of no use afterwards.

    Dropping the engine frees nothing. DeepSpeed refers to every module it has run. A list of the process does, and a
    cache of a class. Every parameter refers to the optimizer. So their memory is given up instead.
    """
    engine.empty_partition_cache()
    engine.destroy()  # removes the hooks and waits for the device
    for parameter in engine.module.parameters():
        state: Any = parameter
        state.ds_tensor.data = state.ds_tensor.new_empty(0)
        state.ds_secondary_tensor = None
    zero = engine.optimizer
    if inner := vars(zero).get("optimizer"):  # none in an engine that only evaluates
        inner.state.clear()
    vars(zero).clear()  # masters, gradients, buckets and flat copies, under any name
    accelerator().empty_cache()
    empty_host_cache()
