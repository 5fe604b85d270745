"""The classes of transformers by `model_type`, and a model's modules without any weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.model.experts import ExpertStack, stack_experts
from loraprune_ds.model.family import PRUNED, family_name
from loraprune_ds.model.frozen import Int8, Int8Linear
from loraprune_ds.model.modeling_pruned import pruned_classes
from loraprune_ds.model.shapes import ModelShape


@cache
def _pruned(family: str) -> tuple[Any, Any, Any]:
    return pruned_classes(family)


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """Returns the class of the config.json of such a model."""
    return _pruned(family_name(model_type))[0] if model_type.startswith(PRUNED) else CONFIG_MAPPING[model_type]


def config_object(config: dict[str, Any]) -> PreTrainedConfig:
    """Makes transformers' object of config.json, with all defaults. Nested settings of `config` stay as they are."""
    return config_class(config["model_type"]).from_dict(copy.deepcopy(config))


def causal_lm_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class of the model with its head."""
    if model_type.startswith(PRUNED):
        return _pruned(family_name(model_type))[2]
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return found


def build_on_meta(config: dict[str, Any], attn_implementation: str = "eager") -> PreTrainedModel:
    """Builds the modules with every parameter on the meta device: shapes only, no memory. Buffers are real.

    Experts are stacks of ours (experts.py).
    """
    made = config_object(config)
    made.use_cache = False
    made._attn_implementation = attn_implementation
    with parameters_on_meta():
        model = causal_lm_class(config["model_type"])(made)
        stack_experts(model)
    return model


def hold_frozen(model: nn.Module, shape: ModelShape) -> None:
    """Has the linears of all decoder layers hold their weights as `shape` says. Those of int8 have no values yet."""
    layers = decoder_layers(model)
    for i, linear in shape.linear_ids():
        if isinstance(form := shape.form(linear), Int8):
            path, _, name = linear.name.rpartition(".")
            stock: Any = layers[i].get_submodule(linear.name)
            if isinstance(stock, ExpertStack):
                stock.hold(form, stock.weight)
            else:
                setattr(layers[i].get_submodule(path), name, Int8Linear(stock, form))


@contextmanager
def refused_in_one_line(where: str) -> Iterator[None]:
    """Names `where` in front of what transformers says about a config.json, which may hold anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises what comes of it
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: transformers cannot build this model from config.json: {reason}") from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Moves every parameter to the meta device as soon as a module has it, before anything is written to its memory.

    Buffers stay real: no weight file holds rotary frequencies or an embedding's scale.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers of a causal LM, wrapped by PEFT or not."""
    for path in ("base_model.model.model.layers", "model.layers"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(layers, nn.ModuleList)
        return layers
    raise AssertionError(f"{type(model).__name__} has no decoder layers")
