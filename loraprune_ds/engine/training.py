"""The engines of our own runs: what infers, what also trains LoRA, and what builds both on one library."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config_types import Dtype, EngineName
from loraprune_ds.files import JsonObject
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.ranks.comm import Communicator

# frozen model -> with LoRA, its AdamW and the schedule of its learning rate
AddLora = Callable[[Any], tuple[Any, AdamW, LambdaLR]]


class InferenceEngine:
    """Holds a model, whose passes `module` makes. Every method is collective.

    Attributes:
        release: frees weights and optimizer state, even if they are still referenced. The engine is unusable then.
    """

    def __init__(self, module: Any, release: Callable[[], None]) -> None:
        self.module = module
        self.release = release

    @torch.no_grad()
    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode."""
        return self.module(**inputs)


class TrainingEngine(InferenceEngine, ABC):
    """Trains LoRA.

    A step is `backward` for each micro-batch, then `update`. Between them the pruner reads the gradients.

    Attributes:
        optimizer: as a `LiveTraining` takes it.
    """

    def __init__(
        self, module: Any, release: Callable[[], None], optimizer: Any, lr_scheduler: LambdaLR
    ) -> None:
        super().__init__(module, release)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss`: its share of the step's loss."""

    @abstractmethod
    def update(self, *, skipped: bool) -> None:
        """Clips and makes the update, unless fp16 has `skipped` it."""

    def infer(self, **inputs: Any) -> Any:
        self.module.eval()
        outputs = super().infer(**inputs)
        self.module.train()
        return outputs

    def restore_counters(self, step: int, lr_scheduler: JsonObject) -> None:
        """Restores the learning-rate schedule and the counts of steps."""
        self.lr_scheduler.load_state_dict(lr_scheduler)
        groups = self.lr_scheduler.optimizer.param_groups
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


class Engine(ABC):
    """Builds the engines of a run on one library. A run calls `check_device`, `start_ranks`, then what builds."""

    name: EngineName

    @abstractmethod
    def check_device(self, dtype: Dtype) -> None:
        """Raises UserError if this rank's device or the library cannot train in `dtype`. It needs no other rank."""

    @abstractmethod
    def start_ranks(self) -> Communicator:
        """Joins the ranks that a launcher has started, if any. UserError if they cannot meet. Collective."""

    @abstractmethod
    def build_training_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        add_lora: AddLora,
        max_norm: float,
    ) -> TrainingEngine:
        """Builds the model with LoRA, AdamW and the learning-rate schedule, ready to train. Collective.

        Products are in `dtype`. Masters and moments of LoRA are fp32.

        Args:
            ds_config: DeepSpeed's JSON, without "auto". Empty without DeepSpeed.
            max_norm: to which gradients are clipped, 0 for any. DeepSpeed's JSON has its own.
        """

    @abstractmethod
    def build_inference_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        *,
        head: bool = True,
    ) -> InferenceEngine:
        """Builds the frozen model without an optimizer. Without `head` it returns `final_hidden`. Collective."""
