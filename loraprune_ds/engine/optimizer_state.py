"""The fp32 masters of LoRA and Adam's moments: gathered for a checkpoint, and restored on any number of ranks."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.ranks.flat import pad
from loraprune_ds.ranks.layout import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")
# (layer, "{linear}.lora_A", key of the state, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, str, int, int], Tensor]


class OptimizerState(ABC):
    """The fp32 masters of LoRA and Adam's moments. Steps hold them whole, for any number of ranks."""

    def __init__(self, optimizer: Any, layout: Layout) -> None:
        self.optimizer = optimizer  # torch's. None before there is one
        self.layout = layout

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Returns the fp32 tensors that Adam updates."""

    @abstractmethod
    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns a flat view of this rank's (padded) fp32 part of `master`, `exp_avg` or `exp_avg_sq`."""

    def keys(self) -> tuple[str, ...]:
        """Names the tensors that are cut and saved along with a parameter. Adam creates moments at its first step."""
        has_moments = any(MOMENTS[0] in state for state in self.optimizer.state.values())
        return ("master", *MOMENTS) if has_moments else ("master",)

    def create_moments(self, others: dict[str, Any]) -> None:
        """Creates zero moments for every master, and a copy of `others`, such as the counts of updates."""
        for master in self.masters():
            moments = {key: torch.zeros_like(master.data) for key in MOMENTS}
            self.optimizer.state[master] = copy.deepcopy(others) | moments

    @property
    def adam_step(self) -> int:
        """The updates that Adam has counted."""
        return next((int(state["step"]) for state in self.optimizer.state.values()), 0)

    def collect(
        self, parameters: dict[str, nn.Parameter], owner: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gathers a layer's masters ("{linear}.lora_A") and moments ("….lora_A.exp_avg") on its owner. Collective."""
        masters = dict[str, Tensor]()
        moments = dict[str, Tensor]()
        for name, parameter in parameters.items():
            for key in self.keys():
                tensor = self.layout.collect(parameter, owner, self.shard(parameter, key))
                if tensor is None:
                    continue
                if key == "master":
                    masters[name] = tensor
                else:
                    moments[f"{name}.{key}"] = tensor
        return masters, moments

    @torch.no_grad()
    def restore(
        self, layers: Iterable[dict[str, nn.Parameter]], read: ReadState, adam_step: int
    ) -> None:
        """Reads this rank's shards of the state."""
        if adam_step:
            self.create_moments({"step": torch.tensor(float(adam_step))})
        for layer, parameters in enumerate(layers):
            for name, parameter in parameters.items():
                start, end = self.layout.part(self.layout.full_shape(parameter))
                for key in self.keys():
                    shard = self.shard(parameter, key)
                    read_shard = read(layer, name, key, start, end).to(self.layout.comm.device)
                    shard.copy_(pad(read_shard, len(shard)))
