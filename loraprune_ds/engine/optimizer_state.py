"""The fp32 masters of what trains, and the optimizer's states. Steps hold them whole, for any number of ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.ranks.flat import pad
from loraprune_ds.ranks.layout import Layout

# of torch and DeepSpeed. Their states have the same names
ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")
# layer -> its masters ("{linear}.lora_A") and states ("{linear}.lora_A.exp_avg"), whole
ReadState = Callable[[int], dict[str, Tensor]]


def optimizer_kind(optimizer: Any) -> str:
    """Names an optimizer. Those of one name go on from each other's states."""
    name = type(optimizer).__name__
    if name not in ADAM:
        return name
    amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
    return "Adam with amsgrad" if amsgrad else "Adam"


class OptimizerState(ABC):
    """Cuts, gathers and restores what the optimizer of a model holds.

    A state is laid out as its master, such as a moment, or it is one number, such as a count of updates.
    """

    def __init__(self, optimizer: Any, layout: Layout) -> None:
        self.optimizer = optimizer  # torch's. None before there is one
        self.layout = layout

    @abstractmethod
    def master(self, parameter: nn.Parameter) -> Tensor:
        """Returns the fp32 tensor that the optimizer updates for a parameter, perhaps with others."""

    @abstractmethod
    def part(self, parameter: nn.Parameter, state: Tensor) -> Tensor:
        """Returns a flat view of this rank's (padded) part of a master or a state of a parameter."""

    def number(self, saved: Tensor) -> Any:
        """Returns a number of a state as the optimizer keeps it."""
        return saved.clone()

    def states(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Returns the optimizer's states of a parameter. Most are made by the first update."""
        return self.optimizer.state.get(self.master(parameter), {})

    def keys(self, parameter: nn.Parameter) -> list[str]:
        """Names the tensors that are cut along with a parameter."""
        states = self.states(parameter).items()
        return ["master", *(key for key, state in states if not is_number(state))]

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns a flat view of this rank's (padded) part of `master` or of a state, which it makes."""
        master = self.master(parameter)
        if key == "master":
            return self.part(parameter, master.detach())
        states = self.optimizer.state[master]
        if key not in states:
            states[key] = torch.zeros_like(master.data)
        return self.part(parameter, states[key])

    def collect(self, parameters: dict[str, nn.Parameter], owner: int) -> dict[str, Tensor]:
        """Gathers the states of parameters ("{name}.exp_avg") on rank `owner`. Empty elsewhere. Collective."""
        found = dict[str, Any]()
        for name, parameter in parameters.items():
            for key, state in self.states(parameter).items():
                if is_number(state):
                    full = torch.tensor(float(state))
                else:
                    full = self.layout.collect(parameter, owner, self.part(parameter, state))
                found[f"{name}.{key}"] = full
        return found if self.layout.comm.rank == owner else {}

    @torch.no_grad()
    def restore(self, layers: Iterable[dict[str, nn.Parameter]], read: ReadState) -> None:
        """Reads this rank's parts of masters and states."""
        for layer, parameters in enumerate(layers):
            for name, saved in read(layer).items():
                if name in parameters:
                    self._fill(parameters[name], "master", saved)
                    continue
                name, _, key = name.rpartition(".")
                parameter = parameters[name]
                if is_number(saved):
                    self.optimizer.state[self.master(parameter)][key] = self.number(saved)
                else:
                    self._fill(parameter, key, saved)

    def _fill(self, parameter: nn.Parameter, key: str, saved: Tensor) -> None:
        start, end = self.layout.part(self.layout.full_shape(parameter))
        shard = self.shard(parameter, key)
        part = saved.view(-1)[start:end].to(self.layout.comm.device)
        shard.copy_(pad(part, len(shard)))

    def groups(self) -> list[JsonObject]:
        """Returns the optimizer's groups of parameters. DeepSpeed knows no empty one."""
        groups = self.optimizer.param_groups
        # DeepSpeed has all in separate buffers
        return [group for group in groups if group["params"]] or groups

    def settings(self) -> list[JsonObject]:
        """Describes the groups. `params` are numbers, as many as the tensors that the optimizer updates."""
        return [group | {"params": [0]} for group in self.groups()]

    def restore_groups(self, saved: list[JsonObject]) -> None:
        """Restores what groups have beside parameters, such as the learning rate."""
        groups = self.groups()
        require(
            len(groups) == len(saved),
            f"the optimizer has {len(groups)} groups of parameters, but the checkpoint {len(saved)}",
        )
        for group, settings in zip(groups, saved, strict=True):
            group |= self.optimizer.defaults | settings | {"params": group["params"]}


def is_number(state: Any) -> bool:
    """Tells whether a state is one number for all elements of a parameter."""
    return not isinstance(state, Tensor) or state.dim() == 0
