"""What both engines of our trainer share: LoRA with AdamW and its schedule, a step's passes, and the saved state."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.pruning.prunable_model import PrunableModel


class TrainingEngine(ABC):
    """Trains the LoRA of `model`. `module` makes the passes. Every method is collective."""

    def __init__(
        self, module: Any, model: PrunableModel, state: OptimizerState, schedule: LambdaLR
    ) -> None:
        self.module = module
        self.model = model
        self.optimizer_state = state
        self.schedule = schedule

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss`: its share of the step's loss."""

    @abstractmethod
    def update(self, *, skipped: bool) -> float | None:
        """Makes the update, unless fp16 has `skipped` it. Returns the gradient norm before clipping, or None."""

    @torch.no_grad()
    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode."""
        self.module.eval()
        outputs = self.module(**inputs)
        self.module.train()
        return outputs

    def loss_scale(self) -> dict[str, Any]:
        """Returns the state of fp16's loss scaler for JSON, if there is one."""
        return {}

    def restore_counters(
        self, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]
    ) -> None:
        """Restores the schedule, the loss scale and the counts of steps."""
        self.schedule.load_state_dict(schedule)
        groups = self.schedule.optimizer.param_groups
        for group, rate in zip(groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    @abstractmethod
    def release(self) -> None:
        """Frees weights and optimizer state, even if they are still referenced. The engine is unusable then."""
