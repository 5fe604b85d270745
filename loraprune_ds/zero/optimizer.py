"""The optimizer state of LoRA: fp32 masters, Adam moments and averaged gradients as flat shards."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range
from loraprune_ds.zero import private
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.params import collect_tensor, overwrite_shard, pad

MOMENTS = ("exp_avg", "exp_avg_sq")
# (layer, "{linear}.lora_A", key of the state, start, end) -> flat fp32 elements [start, end)
ReadState = Callable[[int, str, str, int, int], Tensor]


class OptimizerState:
    """Carries the flat buffers of DeepSpeed's stage-3 optimizer through a cut.

    Smaller shards are written into the old slots, so there is no second copy. `rebuild` then lays out smaller buffers.
    """

    def __init__(self, zero_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self.zero = zero_optimizer
        self.parameters = parameters

    def keys(self) -> tuple[str, ...]:
        """Names the tensors that are cut along with a parameter. Adam creates the moments at its first step."""
        return ("master", *MOMENTS) if self.zero.optimizer.state else ("master",)

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns a view of this rank's (padded) fp32 shard of `master`, `exp_avg` or `exp_avg_sq`."""
        group, offset = self._slot(parameter)
        return self._flat(group, key).narrow(0, offset, parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's (padded) shard of the averaged gradient, between the last backward and the update."""
        # DeepSpeed's public call waits for the device at each parameter, although the end of a backward has waited.
        shards = self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return shards[cast(Any, parameter).ds_id].float()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Lays out flat buffers for the current shapes, and fills them with the carried state. Collective."""
        zero, keys = self.zero, self.keys()
        old_flats = [{key: self._flat(i, key) for key in keys} for i in range(len(zero.fp32_partitioned_groups_flat))]
        old_slots = [self._slot(p) for p in self.parameters]
        states = list(zero.optimizer.state.values())
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None  # the new one has the same size, and two could outweigh the rest of a cut
        for name in private.FLAT_LISTS:
            getattr(zero, name).clear()
        zero.sub_group_to_group_id = {}
        zero.optimizer.state.clear()
        zero._create_fp16_partitions_with_defragmentation(zero.trainable_param_groups)
        zero._setup_for_real_optimizer()
        zero.grad_position = {}
        zero.set_grad_positions()
        zero.averaged_gradients = {}
        zero.zero_grad(set_to_none=True)
        if states:
            self.create_moments({key: value for key, value in states[0].items() if key not in MOMENTS})
        for parameter, (group, offset) in zip(self.parameters, old_slots, strict=True):
            for key in keys:
                new = self.shard(parameter, key)
                new.copy_(old_flats[group][key].narrow(0, offset, new.numel()))

    def create_moments(self, others: dict[str, Any]) -> None:
        """Creates zero moments for every flat buffer, and a copy of `others`, such as the counts of updates."""
        for flat in self.zero.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self.zero.optimizer.state[flat] = copy.deepcopy(others) | moments

    @property
    def adam_step(self) -> int:
        """The updates that Adam has counted."""
        states = list(self.zero.optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def collect(
        self, parameters: dict[str, nn.Parameter], owner: int, comm: Communicator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gathers a layer's state on its owner: masters by "{linear}.lora_A", moments by "{linear}.lora_A.exp_avg".

        Both are empty elsewhere. Collective.
        """
        masters, moments = dict[str, Tensor](), dict[str, Tensor]()
        for name, parameter in parameters.items():
            for key in self.keys():
                tensor = collect_tensor(parameter, owner, comm, self.shard(parameter, key))
                if tensor is not None:
                    to, own = (masters, name) if key == "master" else (moments, f"{name}.{key}")
                    to[own] = tensor
        return masters, moments

    @torch.no_grad()
    def restore(
        self, layers: Iterable[dict[str, nn.Parameter]], read: ReadState, adam_step: int, comm: Communicator
    ) -> None:
        """Reads this rank's shards of the state. The low-precision parameters are set from their masters."""
        if adam_step:
            self.create_moments({"step": torch.tensor(float(adam_step))})
        for layer, parameters in enumerate(layers):
            for name, parameter in parameters.items():
                numel: int = parameter.ds_numel  # type: ignore[attr-defined]
                start, end = owned_range(numel, comm.world_size, comm.rank)
                for key in self.keys():
                    shard = pad(read(layer, name, key, start, end).to(comm.device), numel, comm.world_size)
                    self.shard(parameter, key).copy_(shard)
                    if key == "master":
                        overwrite_shard(parameter, shard)
        settle_shards()  # orders the restored shards of LoRA before the first gather

    def _slot(self, parameter: nn.Parameter) -> tuple[int, int]:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return group, offset

    def _flat(self, group: int, key: str) -> Tensor:
        master = self.zero.fp32_partitioned_groups_flat[group]
        return master.detach() if key == "master" else self.zero.optimizer.state[master][key]
