"""The optimizer state of LoRA: fp32 masters, Adam moments and averaged gradients as flat shards."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.pruning.training import MOMENTS, OptimizerState
from loraprune_ds.zero import private
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.params import overwrite_shard


class ShardedState(OptimizerState):
    """Carries the flat buffers of DeepSpeed's stage-3 optimizer through a cut.

    Smaller shards are written into the old slots, so there is no second copy. `rebuild` then lays out smaller buffers.
    """

    def __init__(self, zero_optimizer: Any, parameters: list[nn.Parameter]) -> None:
        super().__init__(zero_optimizer.optimizer)
        self.zero, self.parameters = zero_optimizer, parameters

    def masters(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def shard(self, parameter: nn.Parameter, key: str) -> Tensor:
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

    def restore(self, *given: Any) -> None:
        super().restore(*given)
        for parameter in self.parameters:  # LoRA in the model's dtype
            overwrite_shard(parameter, self.shard(parameter, "master"))
        settle_shards()  # orders the restored shards of LoRA before the first gather

    def _slot(self, parameter: nn.Parameter) -> tuple[int, int]:
        group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return group, offset

    def _flat(self, group: int, key: str) -> Tensor:
        master = self.zero.fp32_partitioned_groups_flat[group]
        return master.detach() if key == "master" else self.zero.optimizer.state[master][key]
