"""Prepares a user's model before its trainer is made."""

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from loraprune_ds.engines import is_sharded
from loraprune_ds.errors import require
from loraprune_ds.model.adapters import last_names
from loraprune_ds.model.family import find_family
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import read_model, shape_from_config
from loraprune_ds.session.checks import refuse_mixture
from loraprune_ds.session.live import _tied


def linear_names(model: PreTrainedModel | str | Path) -> list[str]:
    """Returns the names of all linears of a decoder layer, for PEFT's `target_modules`.

    Args:
        model: a model, or its folder or hub id. UserError if its type is not supported.
    """
    return last_names(linear.linear for _, linear in prunable_shape(model).linears())


def prunable_shape(model: PreTrainedModel | str | Path) -> ModelShape:
    """Returns the shape in a model's config. Raises UserError if the callback cannot prune such a model."""
    if isinstance(model, PreTrainedModel):
        config = model.config.to_dict()
        where = type(model).__name__
    else:  # AutoConfig would ask on the terminal whether to run code in the folder
        config, _ = PreTrainedConfig.get_config_dict(model)
        where = str(model)
    refuse_mixture(find_family(config.get("model_type"), where), where)
    return shape_from_config(config, where)


def unshare_bias(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a T5 or mT5 into a UMT5 without dropout, to prune it. Each layer gets a copy of the shared bias.

    Raises:
        UserError: the model is already sharded.
    """
    sharded = any(map(is_sharded, model.parameters()))
    require(
        not sharded, "unshare_bias: the model is sharded; load it before you make TrainingArguments"
    )
    shape, umt5 = read_model(model.config.to_dict() | _tied(model), type(model).__name__)
    tensors = model.state_dict()
    for copy, name in shape.shared_tensors.items():
        tensors[copy] = tensors[name]
    umt5.load_state_dict(tensors, assign=True)
    umt5.tie_weights()
    umt5.generation_config = model.generation_config
    return umt5
