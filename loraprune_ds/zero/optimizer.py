"""The optimizer state of LoRA: fp32 masters, Adam moments and averaged gradients as flat shards."""

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.zero import private

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Slot:
    """Names the place of a parameter's shard: the flat buffer and the offset in it."""

    group: int
    offset: int


class OptimizerState:
    """Carries the flat buffers of DeepSpeed's stage-3 optimizer through a change of shapes.

    A smaller shard is written into the old one's slot. So carrying the state needs no copy of all of it. `rebuild` then
    lays out new, smaller buffers and fills them from the old ones.
    """

    def __init__(self, zero_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self.zero = zero_optimizer
        self.parameters = parameters

    def keys(self) -> tuple[str, ...]:
        """Names what must travel with a parameter besides its own shard."""
        has_moments = bool(self.zero.optimizer.state)  # Adam creates them at its first step
        return ("master", *MOMENTS) if has_moments else ("master",)

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Returns this rank's (padded) fp32 shard of `master`, `exp_avg` or `exp_avg_sq`.

        It is a view of its slot, as long as the parameter's present shard. After a cut the slot is longer.
        """
        slot = self._slot(parameter)
        return self._flat(slot.group, key).narrow(0, slot.offset, parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """Returns this rank's (padded) shard of the averaged gradient, between the last backward and the update.

        DeepSpeed's own call waits for the device at each parameter. Here it has waited: the end of a backward does.
        """
        shards = self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        return shards[cast(Any, parameter).ds_id].float()

    @torch.no_grad()
    def rebuild(self) -> None:
        """Lays out new flat buffers for the present shapes. Fills them with the carried state. Collective."""
        zero, keys = self.zero, self.keys()
        old_flats = [{key: self._flat(i, key) for key in keys} for i in range(len(zero.fp32_partitioned_groups_flat))]
        old_slots = {id(p): self._slot(p) for p in self.parameters}
        others = [_beside_moments(state) for state in zero.optimizer.state.values()]
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None  # it is as large as before. Two of them could outweigh all the rest of a cut
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
        if others:
            self.create_moments(others[0])
        for parameter in self.parameters:
            old = old_slots[id(parameter)]
            for key in keys:
                new = self.shard(parameter, key)
                new.copy_(old_flats[old.group][key].narrow(0, old.offset, new.numel()))

    def create_moments(self, others: dict[str, Any]) -> None:
        """Creates zero moments for every flat buffer. Adam makes its own lazily.

        Args:
            others: what the optimizer keeps beside them. torch's Adam counts its updates there, on the device if it is
                fused. DeepSpeed's CPU Adam counts in an int, and its fused Adam elsewhere.
        """
        for flat in self.zero.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self.zero.optimizer.state[flat] = copy.deepcopy(others) | moments

    def _slot(self, parameter: nn.Parameter) -> _Slot:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return _Slot(group, offset)

    def _flat(self, group: int, key: str) -> Tensor:
        master = self.zero.fp32_partitioned_groups_flat[group]
        return master.detach() if key == "master" else self.zero.optimizer.state[master][key]


def _beside_moments(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in MOMENTS}
