"""The fp32 masters of LoRA and Adam's moments: gathered for a checkpoint, and restored on any number of ranks."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range, pad, without_padding

MOMENTS = ("exp_avg", "exp_avg_sq")
# (layer, "{linear}.lora_A", key of the state, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, str, int, int], Tensor]


class OptimizerState(ABC):
    """The fp32 masters of LoRA and Adam's moments. Steps hold them whole, for any number of ranks."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer  # torch's

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """Returns the fp32 tensors that Adam updates."""

    @abstractmethod
    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns a flat view of this rank's (padded) fp32 part of `master`, `exp_avg` or `exp_avg_sq`."""

    def full_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Returns the shape of the parameter over all ranks."""
        return tuple(parameter.shape)

    def part(self, shape: Sequence[int], comm: Communicator) -> tuple[int, int]:
        """Returns the flat elements [start, end) in this rank's `shard` of a parameter of `shape`."""
        return owned_range(math.prod(shape), comm.world_size, comm.rank)

    def gather(
        self, parameter: nn.Parameter, key: str, owner: int, comm: Communicator
    ) -> Tensor | None:
        """Gathers `master`, `exp_avg` or `exp_avg_sq` on rank `owner`. None elsewhere. Collective."""
        return collect_shards(self.shard(parameter, key), self.full_shape(parameter), owner, comm)

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
        self, parameters: dict[str, nn.Parameter], owner: int, comm: Communicator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gathers a layer's masters ("{linear}.lora_A") and moments ("….lora_A.exp_avg") on its owner. Collective."""
        masters = dict[str, Tensor]()
        moments = dict[str, Tensor]()
        for name, parameter in parameters.items():
            for key in self.keys():
                tensor = self.gather(parameter, key, owner, comm)
                if tensor is None:
                    continue
                if key == "master":
                    masters[name] = tensor
                else:
                    moments[f"{name}.{key}"] = tensor
        return masters, moments

    @torch.no_grad()
    def restore(
        self,
        layers: Iterable[dict[str, nn.Parameter]],
        read: ReadState,
        adam_step: int,
        comm: Communicator,
    ) -> None:
        """Reads this rank's shards of the state."""
        if adam_step:
            self.create_moments({"step": torch.tensor(float(adam_step))})
        for layer, parameters in enumerate(layers):
            for name, parameter in parameters.items():
                start, end = self.part(self.full_shape(parameter), comm)
                for key in self.keys():
                    shard = self.shard(parameter, key)
                    read_shard = read(layer, name, key, start, end).to(comm.device)
                    shard.copy_(pad(read_shard, len(shard)))


def collect_shards(
    shard: Tensor, shape: Sequence[int], owner: int, comm: Communicator
) -> Tensor | None:
    """Gathers a tensor of `shape` from the flat, padded shards of all ranks, on rank `owner`. Collective."""
    # an offloaded shard is on the host
    gathered = comm.gather_to(owner, shard.detach().to(comm.device))
    return None if gathered is None else without_padding(gathered, shape)
