"""Connects the pruner with a training on FSDP2."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraprune_ds.engine.live import LiveEngine, LiveTraining
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import ADAPTER
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.layout import Layout

# accelerate's kinds of state, and the names of the model's and the optimizer's
STATES = {
    "FULL_STATE_DICT": ("pytorch_model_fsdp.bin", "optimizer.bin"),
    "SHARDED_STATE_DICT": ("pytorch_model_fsdp_0", "optimizer_0"),
}


class LiveFsdp(LiveEngine):
    """Joins trainings that shard by `fully_shard`."""

    name = "fsdp2"

    def will_train(self, model: PeftModel) -> bool:
        """Tells whether accelerate will shard the model, which is still whole, or whether it is sharded."""
        is_on = is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP
        return is_on or any(map(self.holds, model.parameters()))

    def cut_before_training(
        self, model: PeftModel, shape: ModelShape, keep: list[LayerKeep], comm: Communicator
    ) -> None:
        if any(map(self.holds, model.parameters())):
            from loraprune_ds.fsdp.model import FsdpModel

            FsdpModel(model, shape).cut(keep)
        else:
            super().cut_before_training(model, shape, keep, comm)

    def lacks_state(self, folder: Path, rank: int) -> list[str]:
        plugin: Any = AcceleratorState().fsdp_plugin
        names = STATES[plugin.state_dict_type.name]
        return [name for name in names if not (folder / name).exists()]

    def write_stand_in(
        self,
        folder: Path,
        model: PeftModel,
        step: int,
        groups: list[JsonObject],
        comm: Communicator,
    ) -> None:
        """Writes both kinds of accelerate's state of the model. Without an optimizer's file it reads no other state."""
        (full, _), (sharded, _) = STATES.values()
        torch.save({}, folder / full)
        lora = {"model": get_peft_model_state_dict(model, adapter_name=ADAPTER)}
        save(lora, checkpoint_id=folder / sharded, no_dist=True)

    def holds(self, parameter: Tensor) -> bool:
        return isinstance(parameter, DTensor)

    def layout(self, parameter: Any, comm: Communicator) -> Layout:
        from loraprune_ds.fsdp.rows import RowShards

        return RowShards(parameter.device_mesh, comm.device)

    def recognises(self, training: LiveTraining) -> bool:
        return any(isinstance(module, FSDPModule) for module in training.peft_model.modules())

    def connect(self, training: LiveTraining) -> PrunableModel:
        from loraprune_ds.fsdp.checks import check_fsdp
        from loraprune_ds.fsdp.model import FsdpModel

        *_, optimizer = training.optimizers()
        check_fsdp(training.peft_model, optimizer)
        return FsdpModel(training.peft_model, training.shape, optimizer, training.scaler)
