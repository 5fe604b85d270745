"""Connects the pruner with a training whose every process holds the model whole."""

import torch
from peft import PeftModel
from torch import Tensor

from loraprune_ds.engine.live import LiveEngine, LiveTraining
from loraprune_ds.engine.torch_state import check_optimizer
from loraprune_ds.engine.watched_model import check_private_names
from loraprune_ds.errors import require
from loraprune_ds.local.model import PRIVATE, LocalModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.layout import Whole


class LiveLocal(LiveEngine):
    """Joins trainings in one process or on DDP."""

    name = LocalModel.engine

    def will_train(self, model: PeftModel) -> bool:
        return True

    def holds(self, parameter: Tensor) -> bool:
        return True

    def layout(self, parameter: Tensor, comm: Communicator) -> Whole:
        return Whole(comm)

    def recognises(self, training: LiveTraining) -> bool:
        return True

    def connect(self, training: LiveTraining) -> LocalModel:
        peft_model = training.peft_model
        devices = sorted({str(parameter.device) for parameter in peft_model.parameters()})
        require(
            len(devices) == 1,
            f"the model is spread over {', '.join(devices)}; load it onto one device, or use ZeRO-3",
        )
        halves = {
            parameter.dtype
            for name, parameter in peft_model.named_parameters()
            if ".lora_" in name and parameter.requires_grad
        } - {torch.float32}
        require(
            not halves,
            f"LoRA is in {', '.join(map(str, halves))} without ZeRO-3's fp32 copies, so small updates would be lost; "
            "call get_peft_model with autocast_adapter_dtype=True",
        )
        *_, optimizer = training.optimizers()
        check_private_names(PRIVATE)
        check_optimizer(optimizer)
        return LocalModel(peft_model, training.shape, optimizer, training.scaler)
