"""Drops whole decoder layers of a model in memory. The others then count from 0."""

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config


def config_of_layers(config: JsonObject, shape: ModelShape, layers: Sequence[int]) -> JsonObject:
    """Returns a config.json with these layers alone, which count from 0 there."""
    family = shape.family
    count = len(shape.layers)
    smaller = dict(config)
    # classes compute some lists
    settings = vars(shape.config) | {key: x for key, x in config.items() if x is not None}
    for key, values in settings.items():
        if isinstance(values, list) and len(values) == count:
            # Lists of tokens or factors may be as long by chance.
            by_chance = "token" in key or type(values[0]) is float
            if "layer" in key or not by_chance:
                smaller[key] = [values[i] for i in layers]
    for key in family.layer_letters:
        letters = config.get(key) or ""
        if len(letters) == count:
            smaller[key] = "".join(letters[i] for i in layers)
    for names, rest in zip(family.layer_lists, shape.only(layers).layer_lists, strict=True):
        smaller[names.count] = len(rest)
    smaller |= family.dense_layers([shape.counts[i] for i in layers])
    sizes = config.get(family.per_layer)
    if sizes:
        smaller[family.per_layer] = {
            str(n): sizes[str(i)] for n, i in enumerate(layers) if str(i) in sizes
        }
    return smaller


def drop_layers(model: PreTrainedModel, layers: Collection[int]) -> None:
    """Drops decoder layers of a model in memory, in place. Call it before its trainer is made, also before a resume.

    Raises:
        UserError: the family needs all its layers, or there is no such layer. Layer 0 stays. The model has a tower.
    """
    config = model.config.to_dict()
    where = type(model).__name__
    require(
        "text_config" not in config, f"drop_layers: a {where} has a tower; load its text part alone"
    )
    shape = shape_from_config(config, where)
    stack = decoder_layers(model)
    reason = shape.family.keeps_layers
    require(
        reason is None, f"drop_layers: a {shape.model_type} keeps all its layers, because {reason}"
    )
    unknown = sorted({*layers} - {*range(1, len(stack))})
    require(
        not unknown,
        f"drop_layers: {unknown} are not among layers 1 to {len(stack) - 1}, which may be dropped",
    )
    rest = [i for i in range(len(stack)) if i not in layers]
    for key, value in config_of_layers(config, shape, rest).items():
        is_new = key not in config or value != config[key]
        if is_new:  # a quantization_config stays an object
            setattr(model.config, key, value)
    for i in sorted({*layers}, reverse=True):
        del stack[i]
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the place of its keys and values in a cache
                vars(module)["layer_idx"] = number
