"""Connects the pruner with a training on ZeRO-3. It loads DeepSpeed once that trains."""

from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor

from loraprune_ds.engine.cutting import cut_layers
from loraprune_ds.engine.ds_config import check_reshardable
from loraprune_ds.engine.live import LiveEngine, LiveTraining
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.versions import check_new
from loraprune_ds.zero.shards import NAME, FlatShards, is_sharded


class LiveZero3(LiveEngine):
    """Joins trainings on DeepSpeed. It recognises other stages, too, and refuses them."""

    name = NAME

    def will_train(self, model: PeftModel) -> bool:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        return any(map(is_sharded, model.parameters())) or is_deepspeed_zero3_enabled()

    def cut_before_training(
        self, model: PeftModel, shape: ModelShape, keep: list[LayerKeep], comm: Communicator
    ) -> None:
        """Cuts base weights that are born sharded, and the rest, which every rank still holds whole."""
        from loraprune_ds.zero.cut import cut_layer

        cut_layers(decoder_layers(model), shape, keep, partial(cut_layer, comm=comm))

    def holds(self, parameter: Tensor) -> bool:
        return is_sharded(parameter)

    def layout(self, parameter: Tensor, comm: Communicator) -> FlatShards:
        return FlatShards(comm)

    def recognises(self, training: LiveTraining) -> bool:
        return _ds_config(training) is not None or any(map(_is_deepspeed, training.optimizers()))

    def connect(self, training: LiveTraining) -> PrunableModel:
        check_new("deepspeed")
        ds_config = _ds_config(training)
        if ds_config is not None:
            sizes = {parameter.element_size() for parameter in training.peft_model.parameters()}
            check_reshardable("the DeepSpeed config", ds_config, sizes)
        from loraprune_ds.zero.external_engine import share_model

        optimizers = list(training.optimizers())
        zero_optimizer = next(filter(_is_deepspeed, optimizers), optimizers[-1])
        return share_model(training.peft_model, zero_optimizer, training.shape)


def _ds_config(training: LiveTraining) -> JsonObject | None:
    # of DeepSpeed's engine. PEFT's has another type
    ds_config = training.ds_config or getattr(training.model, "config", None)
    return ds_config if isinstance(ds_config, dict) else None


def _is_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")
