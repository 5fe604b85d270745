"""The state of an optimizer of torch, and which optimizers have a state that can be cut."""

from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.errors import require

OTHER_STATE = ("Adafactor", "LBFGS", "SparseAdam")  # with other shapes than the parameter has


class TorchState(OptimizerState):
    """The states of an optimizer over fp32 parameters, which are their own masters."""

    def master(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def part(self, parameter: nn.Parameter, state: Tensor) -> Tensor:
        return self.layout.held(state).detach().view(-1)

    def restore(self, *arguments: Any) -> None:
        super().restore(*arguments)
        # moves the counts to where a fused Adam has them
        self.optimizer.load_state_dict(self.optimizer.state_dict())


def check_optimizer(optimizer: Any) -> None:
    """Raises UserError if a cut does not know the optimizer's state."""
    kind = type(optimizer)
    is_torch = isinstance(optimizer, torch.optim.Optimizer)
    is_torch = is_torch and kind.__module__.startswith("torch.optim")
    require(
        is_torch and kind.__name__ not in OTHER_STATE,
        f"the optimizer state of {kind.__module__}.{kind.__name__} cannot be cut along with LoRA; "
        "use torch's AdamW, which is optim='adamw_torch' of a Trainer",
    )
