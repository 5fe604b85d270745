"""How an engine joins the training of another loop: a Trainer's, or a user's own.

A new engine takes these steps, in this order:

1. Its `PrunableModel` passes tests/numerics/test_engines.py, which runs over the list in tests/support/engines.py.
   A model that an optimizer of torch trains is a `WatchedModel`. Its state is a `TorchState`.
2. Its `LiveEngine` stands in loraprune_ds/engines.py, before the one that takes any training.
3. Private names of its library stand in one file. `connect` checks them.
4. It has a row in LAYERS of tests/unit/test_layering.py. Importing its `LiveEngine` must not import its library.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from loraprune_ds.config_types import EngineName
from loraprune_ds.engine.cutting import cut_layers, cut_whole
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.layout import Layout


@dataclass(frozen=True)
class LiveTraining:
    """Holds what another loop trains.

    Attributes:
        model: DeepSpeed's engine, DistributedDataParallel, or the PEFT model inside.
        shape: of the weights of `peft_model`.
        optimizer: torch's or DeepSpeed's, perhaps in wrappers of accelerate.
        ds_config: DeepSpeed's JSON, if `model` is not its engine.
        scaler: torch's loss scaler, if the loop has one.
    """

    model: nn.Module
    peft_model: PeftModel
    shape: ModelShape
    optimizer: Any
    ds_config: JsonObject | None = None
    scaler: Any = None

    def optimizers(self) -> Iterator[Any]:
        """Yields the optimizer, then those that it wraps. The last is torch's."""
        optimizer = self.optimizer
        yield optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
            yield optimizer


class LiveEngine(ABC):
    """Connects the pruner with trainings of other loops on one library.

    A resume calls `will_train` and `cut_before_training` on a dense model, and fills weights that a refit has
    changed by their `layout`. Then a training calls `recognises` and `connect`.
    """

    name: EngineName

    # Before a training

    @abstractmethod
    def will_train(self, model: PeftModel) -> bool:
        """Tells whether this engine will train a model that has no optimizer yet. Not collective."""

    def cut_before_training(
        self, model: PeftModel, shape: ModelShape, keep: list[LayerKeep], comm: Communicator
    ) -> None:
        """Removes all other groups from a dense model of `shape` that has no optimizer yet. Collective."""
        cut_layers(decoder_layers(model), shape, keep, cut_whole)

    # A parameter, before and in a training. Not collective

    @abstractmethod
    def holds(self, parameter: Tensor) -> bool:
        """Tells whether this engine holds the parameter."""

    @abstractmethod
    def layout(self, parameter: Any, comm: Communicator) -> Layout:
        """Returns how this engine lays out a parameter that it holds."""

    # In a training

    @abstractmethod
    def recognises(self, training: LiveTraining) -> bool:
        """Tells whether this engine's library trains the model, in any of its modes. Not collective."""

    @abstractmethod
    def connect(self, training: LiveTraining) -> PrunableModel:
        """Wraps the model for the pruner. Collective. Raises UserError if it cannot be cut."""
