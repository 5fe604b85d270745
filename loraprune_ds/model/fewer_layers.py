"""Drops whole decoder layers of a model, on disk or in memory. The others then count from 0."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from loraprune_ds.errors import require
from loraprune_ds.model.classes import config_object, decoder_layers
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shape import ModelShape


def droppable(shape: ModelShape, key: str, tower: dict[str, Any] | None = None) -> range:
    """Returns the layers that may be dropped. Layer 0 stays.

    Args:
        key: the error begins with it.
        tower: config.json of the multimodal model around it. The tower may feed the first layers.

    Raises:
        UserError: the family needs all its layers.
    """
    reason = shape.family.keeps_layers
    require(reason is None, f"{key}: a {shape.model_type} keeps all its layers, because {reason}")
    vision = getattr(config_object(tower), "vision_config", None) if tower else None
    return range(max(1, len(getattr(vision, "deepstack_visual_indexes", ()))), len(shape.layers))


def config_of_layers(config: dict[str, Any], shape: ModelShape, layers: Sequence[int]) -> dict[str, Any]:
    """Returns a config.json with these layers of its text part alone, which count from 0 there."""
    family, count, text = shape.family, len(shape.layers), config.get("text_config", config)
    found = vars(shape.config) | {key: x for key, x in text.items() if x is not None}  # classes compute some lists
    lists = {key: x for key, x in found.items() if isinstance(x, list) and len(x) == count}
    # Lists of tokens or factors may be as long by chance.
    by_layer = {key: x for key, x in lists.items() if "layer" in key or not ("token" in key or type(x[0]) is float)}
    few = text | {key: [x[i] for i in layers] for key, x in by_layer.items()}
    of_lists = zip(family.layer_lists, shape.only(layers).layer_lists, strict=True)
    few |= {names.count: len(left) for names, left in of_lists}
    few |= family.dense_layers([n for n, i in enumerate(layers) if not shape.counts[i].get("experts")], len(layers))
    if sizes := text.get(family.per_layer):
        few[family.per_layer] = {str(n): sizes[str(i)] for n, i in enumerate(layers) if str(i) in sizes}
    return config | {"text_config": few} if "text_config" in config else few


def without_layers(config: dict[str, Any], shape: ModelShape, dropped: Collection[int]) -> dict[str, Any]:
    """Returns config.json of the model without some layers. It may be a multimodal one."""
    return config_of_layers(config, shape, [i for i in range(len(shape.layers)) if i not in dropped])


def names_without_layers(names: Mapping[str, str], path: str, dropped: Collection[int]) -> dict[str, str]:
    """Renames the keys, which are tensors of a model whose layers are at `path`, and leaves out dropped layers."""
    left = dict[str, str]()
    for name, in_file in names.items():
        if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
            if (number := int(match[1])) in dropped:
                continue
            name = f"{path}.{number - sum(i < number for i in {*dropped})}.{name[match.end() :]}"
        left[name] = in_file
    return left


def drop_layers(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Drops decoder layers of a model in memory, in place. Call it before its trainer is made, also before a resume.

    Raises:
        UserError: the family needs all its layers, or there is no such layer. Layer 0 stays. The model has a tower.
    """
    config, where = model.config.to_dict(), type(model).__name__
    require("text_config" not in config, f"drop_layers: a {where} has a tower; load its text part alone")
    shape, stack = shape_from_config(config, where), decoder_layers(model)
    may = droppable(shape, "drop_layers")
    bad = sorted({*layers} - {*may})
    require(not bad, f"drop_layers: {bad} are not among layers {may.start} to {may.stop - 1}, which may be dropped")
    for key, value in without_layers(config, shape, layers).items():
        setattr(model.config, key, value)
    for i in sorted({*layers}, reverse=True):
        del stack[i]
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the place of its keys and values in a cache
                vars(module)["layer_idx"] = number
