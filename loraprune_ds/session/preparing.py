"""Prepares a user's model before its trainer is made."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedConfig, PreTrainedModel

from loraprune_ds.engines import is_sharded, join_rows
from loraprune_ds.errors import require
from loraprune_ds.model.adapters import STACKS, meet_stacks, target_modules, task_type
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import read_model, shape_from_config
from loraprune_ds.session.live import _tied


def linear_names(model: PreTrainedModel | str | Path) -> list[str]:
    """Returns the names of all linears of a decoder layer, for PEFT's `target_modules`.

    Args:
        model: a model, or its folder or hub id. UserError if its type is not supported.
    """
    return target_modules(prunable_shape(model))


def prunable_shape(model: PreTrainedModel | str | Path) -> ModelShape:
    """Returns the shape in a model's config. Raises UserError if the callback cannot prune such a model."""
    if isinstance(model, PreTrainedModel):
        config = model.config.to_dict()
        where = type(model).__name__
    else:  # AutoConfig would ask on the terminal whether to run code in the folder
        config, _ = PreTrainedConfig.get_config_dict(model)
        where = str(model)
    return shape_from_config(config, where)


def lora_config(model: PreTrainedModel | str | Path, **settings: Any) -> LoraConfig:
    """Makes PEFT's config of LoRA on all linears of the decoder layers, experts too.

    Args:
        model: a model, or its folder or hub id. UserError if its type is not supported.
        settings: of PEFT's LoraConfig, such as r, lora_alpha and lora_dropout.
    """
    shape = prunable_shape(model)
    config = LoraConfig(
        target_modules=target_modules(shape), task_type=task_type(shape), **settings
    )
    config._register_custom_module(STACKS)
    return config


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model one that cuts can shrink, before it gets LoRA. Most families need nothing.

    The experts of a layer become stacks, in place. A T5 or mT5 becomes a UMT5 without dropout: a layer gets a copy of
    the shared bias.

    Raises:
        UserError: a T5 is already sharded.
    """
    family = prunable_shape(model).family
    if family.has_experts:
        stack_experts(model, join_rows)
        meet_stacks()
    if family.shared_bias is None:
        return model
    require(
        not any(map(is_sharded, model.parameters())),
        "prepare_model: the model is sharded; load it before you make TrainingArguments",
    )
    shape, umt5 = read_model(model.config.to_dict() | _tied(model), type(model).__name__)
    tensors = model.state_dict()
    for copy, name in shape.shared_tensors.items():
        tensors[copy] = tensors[name]
    umt5.load_state_dict(tensors, assign=True)
    umt5.tie_weights()
    umt5.generation_config = model.generation_config
    return umt5
