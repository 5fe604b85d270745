"""Reads and checks a trainer's live PEFT model. A refusal is one line before step 1."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from loraprune_ds.config_types import Dtype
from loraprune_ds.engines import full_shape
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import base_linear, base_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import (
    DTYPES,
    Blocks,
    QuantisedLinear,
    storage_format,
    stored_tensors,
)
from loraprune_ds.model.groups import Kind, LayerCounts, LayerSpec, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.session.compiled import check_not_compiled

WRAPPERS = ("FullyShardedDataParallel", "DataParallel")  # FSDP1, and copies of a whole model


def find_peft_model(model: nn.Module) -> PeftModel:
    """Finds the PEFT model inside an engine. Raises UserError if there is none, or a part cannot be cut."""
    check_not_compiled(model)
    for module in model.modules():
        kind = type(module).__name__
        require(
            kind not in WRAPPERS,
            f"{kind} cannot be cut; use DistributedDataParallel, FSDP2 (fully_shard) or ZeRO-3",
        )
    inner: Any = model
    while not isinstance(inner, PeftModel) and hasattr(inner, "module"):
        inner = inner.module
    require(
        isinstance(inner, PeftModel),
        f"pruning needs a PEFT model with LoRA; this is a {type(inner).__name__}",
    )
    return inner


def base_config(model: PeftModel) -> JsonObject:
    """Returns config.json of the dense model, as `save_pretrained` would write it."""
    config = json.loads(cast(Any, model.get_base_model()).config.to_json_string())
    config.pop("use_cache", None)  # trainers switch it off
    return config | _tied(model.get_base_model())


def _tied(base: Any) -> dict[str, bool]:
    """Returns the setting for a head tied to the embedding. The config may claim it although the files have both."""
    head = base_parameter(base.get_output_embeddings(), "weight")
    embedding = base_parameter(base.get_input_embeddings(), "weight")
    return {"tie_word_embeddings": head is embedding}


def base_name(model: PeftModel) -> str:
    """Names the dense model: a hub id or the last part of a folder."""
    base = cast(Any, model.get_base_model())
    return Path(base.config._name_or_path).name or type(base).__name__


def base_shape(model: PeftModel) -> ModelShape:
    """Returns the shape in the model's config, which stays the dense shape. Raises UserError if it has a tower."""
    base = cast(Any, model.get_base_model())
    name = base_name(model)
    config = base.config.to_dict()
    require(
        "text_config" not in config,
        f"{name} is a {type(base).__name__}, but the callback prunes no model with a tower; "
        "load its text part alone, or use launch/run.py, which keeps the tower",
    )
    return shape_from_config(config | _tied(base), name)


def live_shape(model: PeftModel) -> ModelShape:
    """Returns the shape of the weights."""
    shape = base_shape(model)
    pairs = zip(decoder_layers(model), shape.layers, strict=True)
    return shape.resized([_live_counts(layer, spec) for layer, spec in pairs])


def _live_counts(layer: nn.Module, spec: LayerSpec) -> LayerCounts:
    counts = dict[Kind, int]()
    for linear in spec.linears:
        if linear.spans:
            size = _matrix(layer, linear)[linear.axis]
            counts[linear.spans[0].kind] = size // linear.group_width
    return LayerCounts(counts)


def _matrix(layer: nn.Module, spec: TensorSpec) -> tuple[int, ...]:
    """Returns the shape of a weight, whatever the shape of the tensors that store it."""
    linear = base_linear(layer, spec.linear)
    if isinstance(linear, QuantisedLinear):
        return linear.out_features, linear.in_features
    return full_shape(base_parameter(layer, spec.name))


def _weight_dtype(linear: nn.Module) -> torch.dtype:
    stored_as = storage_format(linear)
    return stored_as.dtype if isinstance(stored_as, Blocks) else stored_tensors(linear)[0].dtype


def base_dtype(model: PeftModel, shape: ModelShape) -> Dtype:
    """Returns the dtype of the frozen weights. Raises UserError if no export can have that dtype."""
    name = shape.layers[0].linears[0].name
    dtype = _weight_dtype(base_linear(decoder_layers(model)[0], name.removesuffix(".weight")))
    dtype_name = next((key for key, value in DTYPES.items() if value == dtype), None)
    require(
        dtype_name is not None,
        f"layer 0 {name} is {dtype}; only a base in {', '.join(DTYPES)} can be pruned",
    )
    require(
        dtype_name != "float16" or not shape.family.has_encoder,
        f"hidden states of a {shape.model_type} overflow float16; load it in bfloat16",
    )
    return cast(Dtype, dtype_name)
