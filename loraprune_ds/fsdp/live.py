"""Connects the pruner with a training on FSDP2."""

from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from loraprune_ds.engine.live import LiveEngine, LiveTraining
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.layout import Layout


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
