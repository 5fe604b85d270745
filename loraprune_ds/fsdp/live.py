"""Connects the pruner with a training on FSDP2."""

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraprune_ds.engine.live import LiveEngine, LiveTraining, ReadFlat
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import set_sizes
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel, cut_whole, parameter_cuts
from loraprune_ds.ranks.comm import Communicator

# accelerate's state of the optimizer, of a FULL_STATE_DICT and of a SHARDED_STATE_DICT
OPTIMIZER_NAMES = ("optimizer.bin", "optimizer_0")
FSDP_IS_ON = "ACCELERATE_USE_FSDP"  # accelerate sets it, also for a Trainer


class LiveFsdp(LiveEngine):
    """Joins trainings that shard by `fully_shard`."""

    name = "fsdp2"

    def will_train(self, model: PeftModel) -> bool:
        """Tells whether a Trainer will shard the model, which is still whole, or whether it is sharded."""
        is_on = os.environ.get(FSDP_IS_ON, "").lower() in ("1", "true")
        return is_on or any(map(self.holds, model.parameters()))

    def cut_before_training(
        self, model: PeftModel, shape: ModelShape, keep: list[LayerKeep], comm: Communicator
    ) -> None:
        if any(map(self.holds, model.parameters())):
            from loraprune_ds.fsdp.model import FsdpModel

            FsdpModel(model, shape).cut(keep)
            return
        for layer, spec, layer_keep in zip(decoder_layers(model), shape.layers, keep, strict=True):
            for parameter, kept in parameter_cuts(layer, spec, layer_keep):
                cut_whole(parameter, kept)
            set_sizes(layer, spec.resized(layer_keep.counts))

    def lacks_state(self, folder: Path, rank: int) -> list[str]:
        has_state = any((folder / name).exists() for name in OPTIMIZER_NAMES)
        return [] if has_state else [" or ".join(OPTIMIZER_NAMES)]

    def write_stand_in(
        self, folder: Path, step: int, groups: list[dict[str, Any]], comm: Communicator
    ) -> None:
        raise UserError(f"{folder}: only what FSDP2 has saved goes on under FSDP2")

    def holds(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    def fill(self, parameter: Tensor, read: ReadFlat, comm: Communicator) -> None:
        from loraprune_ds.fsdp.rows import RowShards

        assert isinstance(parameter, DTensor)
        rows = RowShards(parameter.device_mesh, comm.device)
        local = parameter.to_local()
        local.copy_(read(*rows.owned_flat(parameter.shape)).view_as(local))

    def recognises(self, training: LiveTraining) -> bool:
        return any(isinstance(module, FSDPModule) for module in training.peft_model.modules())

    def connect(self, training: LiveTraining) -> PrunableModel:
        from loraprune_ds.fsdp.checks import check_fsdp
        from loraprune_ds.fsdp.model import FsdpModel

        *_, optimizer = training.optimizers()
        check_fsdp(training.peft_model, optimizer)
        scaler = getattr(training.optimizer, "scaler", None)
        return FsdpModel(training.peft_model, training.shape, optimizer, scaler)
