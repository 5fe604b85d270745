"""The optimizer state of the LoRA parameters: fp32 masters, Adam moments and averaged gradients as flat pieces."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.zero import private

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Slot:
    """Where a parameter's piece lies: which flat buffer, at which offset."""

    group: int
    offset: int


class OptimizerState:
    """Reads and rebuilds the flat buffers of DeepSpeed's stage-3 optimizer across a change of shapes.

    A smaller piece is written into the old one's slot, so carrying the state needs no copy of it all;
    `rebuild` then lays out new, smaller buffers and fills them from the old ones.
    """

    def __init__(self, zero_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self.zero = zero_optimizer
        self.parameters = parameters

    def keys(self) -> tuple[str, ...]:
        """What must travel with a parameter besides its own piece."""
        has_moments = bool(self.zero.optimizer.state)  # Adam creates them at its first step
        return ("master", *MOMENTS) if has_moments else ("master",)

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
        """This rank's (padded) fp32 piece of `master`, `exp_avg` or `exp_avg_sq`: a view of its slot.

        Its length is the parameter's present one, so after a shrink it is the head of a slot that is too long.
        """
        slot = self._slot(parameter)
        return self._flat(slot.group, key).narrow(0, slot.offset, parameter.ds_tensor.ds_numel)  # type: ignore[attr-defined]

    @torch.no_grad()
    def rebuild(self) -> None:
        """New flat buffers for the present shapes, filled with the carried state. Collective."""
        zero, keys = self.zero, self.keys()
        old_flats = [{key: self._flat(i, key) for key in keys} for i in range(len(zero.fp32_partitioned_groups_flat))]
        old_slots = {id(p): self._slot(p) for p in self.parameters}
        steps = [state["step"] for state in zero.optimizer.state.values()]
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None  # it is as large as before, and two of them could outweigh all the rest of a cut
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
        if steps:
            self.create_moments(int(steps[0]))
        for parameter in self.parameters:
            old = old_slots[id(parameter)]
            for key in keys:
                new = self.shard(parameter, key)
                new.copy_(old_flats[old.group][key].narrow(0, old.offset, new.numel()))

    def create_moments(self, step: int) -> None:
        """Zero moments for every flat buffer, as Adam has them after `step` updates: it makes them lazily."""
        for flat in self.zero.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self.zero.optimizer.state[flat] = {"step": torch.tensor(float(step)), **moments}

    def _slot(self, parameter: nn.Parameter) -> _Slot:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return _Slot(group, offset)

    def _flat(self, group: int, key: str) -> Tensor:
        master = self.zero.fp32_partitioned_groups_flat[group]
        return master.detach() if key == "master" else self.zero.optimizer.state[master][key]
