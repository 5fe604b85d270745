"""The state of an optimizer of torch, and which optimizers have a state that can be cut."""

from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.errors import require

OTHER_STATE = ("Adafactor", "LBFGS", "SparseAdam")  # with other shapes than the parameter has


class TorchState(OptimizerState):
    """The state of Adam over fp32 LoRA, which is its own master."""

    def masters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        if key == "master":
            return self.layout.held(parameter).detach().view(-1)
        moment = self.optimizer.state[parameter].get(key)
        if moment is None:  # before its first gradient
            moment = torch.zeros_like(parameter)
        return self.layout.held(moment).view(-1)

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
