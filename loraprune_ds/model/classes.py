"""transformers' classes by `model_type`, and the modules of a model without weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import base_parameter, set_sizes
from loraprune_ds.model.experts import ExpertStack, stack_experts
from loraprune_ds.model.families.base import PRUNED, Family
from loraprune_ds.model.family import FAMILIES, LLAMA, family_name
from loraprune_ds.model.frozen import Blocks, QuantisedLinear
from loraprune_ds.model.modeling_pruned import pruned_classes
from loraprune_ds.model.shape import ModelShape

_pruned = cache(pruned_classes)  # each family has one set of classes
IN_WRAPPER = "_checkpoint_wrapped_module"  # of a layer, by torch's activation checkpointing


def config_class(model_type: str) -> type[PreTrainedConfig]:
    if model_type.startswith(PRUNED):
        config, _, _ = _pruned(family_name(model_type))
        return config
    return CONFIG_MAPPING[model_type]


def config_object(config: JsonObject) -> PreTrainedConfig:
    """Makes transformers' object from config.json, with all defaults. Does not change nested settings of `config`."""
    # transformers writes infinity as a dict
    plain = PreTrainedConfig._decode_special_floats(copy.deepcopy(config))
    return config_class(config["model_type"]).from_dict(plain)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Returns the sliding window. Some classes ignore this setting of config.json."""
    if not hasattr(type(config), "sliding_window"):
        return None
    return getattr(config, "sliding_window", None) or None


def causal_lm_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class of the model with its head."""
    if model_type.startswith(PRUNED):
        _, _, language_model = _pruned(family_name(model_type))
        return language_model
    family = FAMILIES[model_type]
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if family.has_encoder:
        classes = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return family.lm_class() or classes[CONFIG_MAPPING[model_type]]


def attn_implementation(requested: str, family: Family) -> str:
    """Returns the attention implementation for a value of `model.attn_implementation`."""
    # torch's sdpa cannot cap scores or add sinks. transformers would drop the cap, or refuse the model.
    if requested == "sdpa" and family.eager_only is not None:
        return "eager"
    return requested


def describe_attention(requested: str, family: Family) -> str | None:
    """Names the implementation that replaces the requested one. None if there is no replacement."""
    used = attn_implementation(requested, family)
    if used == requested:
        return None
    return (
        f"model.attn_implementation: {used} instead of {requested}, which lacks {family.eager_only}"
    )


def check_flash_attention(config: ModelConfig) -> None:
    """Raises UserError if flash attention is requested without a GPU or in fp32. transformers checks its package."""
    if not config.attn_implementation.startswith("flash_attention"):
        return
    setting = f"model.attn_implementation {config.attn_implementation}"
    require(
        config.dtype != "float32",
        f"{setting} needs model.dtype bfloat16 or float16; got {config.dtype}",
    )
    require(torch.cuda.is_available(), f"{setting} needs a GPU, but this rank sees none")


def build_on_meta(config: JsonObject, attn_implementation: str = "eager") -> PreTrainedModel:
    """Builds the modules with all parameters on the meta device, without memory.

    Buffers are real, because weight files lack rotary frequencies and an embedding's scale. Experts become our stacks
    (experts.py).
    """
    family = FAMILIES[family_name(config["model_type"])]
    config = {**config, **family.in_memory}
    settings = config_object(config)
    settings.use_cache = False
    settings._attn_implementation = attn_implementation
    with init_empty_weights(include_buffers=False):
        model = causal_lm_class(config["model_type"])(settings)
        stack_experts(model)
    if family.has_encoder and not config.get("tie_word_embeddings", True):
        # transformers 5 ties the head in any case.
        tied: dict[str, str] = dict(model._tied_weights_keys)  # type: ignore[arg-type]
        tied.pop("lm_head.weight", None)
        model._tied_weights_keys = tied
    model.tie_weights()  # each had become a separate parameter on the meta device
    return model


def store_linears(model: nn.Module, shape: ModelShape, formats: Mapping[str, Blocks]) -> None:
    """Gives linears of the decoder layers their formats, by the names of weights. They are still without values."""
    layers = decoder_layers(model)
    for i, linear in shape.linears():
        stored_as = formats.get(shape.prefix(i) + linear.name)
        if stored_as is None:
            continue
        stock: Any = layers[i].get_submodule(linear.linear)
        tensors = {
            name: torch.empty(size, dtype=dtype, device="meta")
            for name, (size, dtype) in stored_as.stored(linear.matrix).items()
        }
        if isinstance(stock, ExpertStack):
            stock.store_as(stored_as, tensors)
        else:
            layers[i].set_submodule(linear.linear, QuantisedLinear(stock, stored_as, tensors))


def shrink_on_meta(model: nn.Module, shape: ModelShape) -> None:
    """Gives modules on the meta device the sizes of a smaller shape, like a cut of a live model."""
    for layer, spec in zip(decoder_layers(model), shape.layers, strict=True):
        for tensor in spec.tensors:
            parameter = base_parameter(layer, tensor.name)
            parameter.data = parameter.new_empty(tensor.shape)
        set_sizes(layer, spec)


@contextmanager
def refused_in_one_line(where: str, advice: str = "") -> Iterator[None]:
    """Turns transformers' errors about a config.json into a UserError that names `where` and ends with `advice`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a config.json can hold anything
        # some messages list all model types
        reason = f"{type(error).__name__}: {one_line(error)[:200].rstrip('.')}"
        raise UserError(
            f"{where}: transformers cannot build this model from config.json: {reason}{advice}"
        ) from error


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the layers of a language model, an encoder's first, wrapped by PEFT or not."""
    lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    family = FAMILIES.get(family_name(lm.config.model_type), LLAMA)
    lists: list[Any] = [lm.get_submodule(layers.path) for layers in family.layer_lists]
    own = list(chain(*lists))
    layers = [getattr(layer, IN_WRAPPER, layer) for layer in own]
    if len(lists) == 1 and layers == own:
        return lists[0]
    return nn.ModuleList(layers)
