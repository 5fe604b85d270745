"""Drops whole decoder layers of a model in memory. The others then count from 0."""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedModel

from loraprune_ds.errors import require
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config


def config_of_layers(
    config: dict[str, Any], shape: ModelShape, layers: Sequence[int]
) -> dict[str, Any]:
    """Returns a config.json with these layers alone, which count from 0 there."""
    family, count = shape.family, len(shape.layers)
    # classes compute some lists
    found = vars(shape.config) | {key: x for key, x in config.items() if x is not None}
    lists = {key: x for key, x in found.items() if isinstance(x, list) and len(x) == count}
    # Lists of tokens or factors may be as long by chance.
    by_layer = {
        key: x
        for key, x in lists.items()
        if "layer" in key or not ("token" in key or type(x[0]) is float)
    }
    few = config | {key: [x[i] for i in layers] for key, x in by_layer.items()}
    letters = {
        key: config[key] for key in family.layer_letters if len(config.get(key) or "") == count
    }
    few |= {key: "".join(x[i] for i in layers) for key, x in letters.items()}
    of_lists = zip(family.layer_lists, shape.only(layers).layer_lists, strict=True)
    few |= {names.count: len(left) for names, left in of_lists}
    few |= family.dense_layers(
        [n for n, i in enumerate(layers) if not shape.counts[i].get("experts")], len(layers)
    )
    if sizes := config.get(family.per_layer):
        few[family.per_layer] = {
            str(n): sizes[str(i)] for n, i in enumerate(layers) if str(i) in sizes
        }
    return few


def drop_layers(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Drops decoder layers of a model in memory, in place. Call it before its trainer is made, also before a resume.

    Raises:
        UserError: the family needs all its layers, or there is no such layer. Layer 0 stays. The model has a tower.
    """
    config, where = model.config.to_dict(), type(model).__name__
    require(
        "text_config" not in config, f"drop_layers: a {where} has a tower; load its text part alone"
    )
    shape, stack = shape_from_config(config, where), decoder_layers(model)
    reason = shape.family.keeps_layers
    require(
        reason is None, f"drop_layers: a {shape.model_type} keeps all its layers, because {reason}"
    )
    bad = sorted({*layers} - {*range(1, len(stack))})
    require(
        not bad,
        f"drop_layers: {bad} are not among layers 1 to {len(stack) - 1}, which may be dropped",
    )
    left = [i for i in range(len(stack)) if i not in layers]
    for key, value in config_of_layers(config, shape, left).items():
        setattr(model.config, key, value)
    for i in sorted({*layers}, reverse=True):
        del stack[i]
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the place of its keys and values in a cache
                vars(module)["layer_idx"] = number
