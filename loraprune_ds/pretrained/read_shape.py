"""Reads a model's sizes: what its family says of each layer, and the shapes of modules without weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.classes import (
    build_on_meta,
    config_class,
    config_object,
    refused_in_one_line,
)
from loraprune_ds.model.families.base import Family, Marks
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.families.moe import Moe
from loraprune_ds.model.family import find_family
from loraprune_ds.model.groups import Attribute, Kind, LayerSpec, Shape, TensorSpec
from loraprune_ds.model.modeling_pruned import layer_config
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import MULTIMODAL, text_config

FEW_HEADS = 2  # with so few key-value heads a layer, each is half of its attention or all
# Fields about layers that a class without these layers ignores.
OTHER_LAYERS = (
    "kv_lora_rank",
    "linear_num_key_heads",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
)
# LLaMA (arXiv 2302.13971, table 2). Heads have 128 dimensions, and there are 32,000 tokens.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LLAMA_SIZES = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-30b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
}


def read_model_config(model: str, revision: str | None = None) -> JsonObject:
    """Reads config.json alone. No weight is read or downloaded.

    Args:
        model: a folder, a hub id, or a name of LLAMA_SIZES.
    """
    if model in LLAMA_SIZES:
        sizes = zip(SIZES, LLAMA_SIZES[model], strict=True)
        return {"model_type": "llama", "vocab_size": 32_000, **dict(sizes)}
    folder = locate_model(ModelConfig(model, revision=revision), "model: ", ["config.json"])
    return read_json(folder / "config.json")


def shape_from_config(config: JsonObject, where: str) -> ModelShape:
    """Returns the shape of `read_model` alone."""
    return read_model(config, where)[0]


def read_model(config: JsonObject, where: str) -> tuple[ModelShape, PreTrainedModel]:
    """Reads `config.json` of a supported model or of the text part of a multimodal one, with the sizes of its layers.

    Returns the shape, and the modules on the meta device that it was read from.

    Raises:
        UserError: the model type is not supported. A size is missing or impossible. Key-value heads do not divide query
            heads. transformers refuses the config. A tensor has a shape that its family does not explain. The line
            names `where`, the folder or hub id.
    """
    config = text_config(config, where)
    family = read_family(config, where)
    queries_leave = _check_sizes(config, family, where)
    with refused_in_one_line(where):
        settings = config_object(config | {QUERY_HEADS_LEAVE: queries_leave})
        modules = build_on_meta(config)
    layers: list[LayerSpec] = []
    equal: dict[LayerSpec, LayerSpec] = {}
    for number, names in enumerate(family.layer_lists):
        stack: Any = modules.get_submodule(names.path)
        for i, module in enumerate(stack):
            of_layer = layer_config(settings, len(layers), family.per_layer)
            marks = list(family.layer(of_layer, len(layers)))
            layer = _layer(number, marks, _shapes(module), f"{where}: {names.path}.{i}.")
            layers.append(equal.setdefault(layer, layer))
    first = layer_config(settings, 0, family.per_layer)
    kinds = _kinds(family.layer(first, 0), layers)
    if isinstance(family, Moe):
        family.check_layers([layer.counts for layer in layers], where)
    in_layers = tuple(f"{names.path}." for names in family.layer_lists)
    outer = [
        TensorSpec(name, shape=shape)
        for name, shape in _shapes(modules).items()
        if not name.startswith(in_layers)
    ]
    return ModelShape(config["model_type"], kinds, tuple(layers), tuple(outer), first), modules


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def check_depth(config: JsonObject, family: Family, names: Collection[str], where: str) -> None:
    """Checks that the files hold the last layer that config.json counts, before any is built."""
    for layers in family.layer_lists:
        count = config.get(layers.count)
        if isinstance(count, int) and count > 0:
            last = f"{layers.path}.{count - 1}."
            require(
                any(name.startswith(last) for name in names),
                f"{where}: tensor {last}* is missing, but config.json says {layers.count} {count}",
            )


def check_family(
    family: Family, source: JsonObject, where: str, dtype: str, *, packing: bool
) -> None:
    """Checks that this family can do what a run asks for. `source` is config.json.

    Raises:
        UserError: it cannot. The line names `where`, the folder or hub id.
    """
    if packing and not family.packs:
        raise UserError(
            f"data.packing is not supported for {where}: its class in transformers mixes samples"
        )
    if family.has_encoder and dtype == "float16":
        raise UserError(
            f"model.dtype float16 is not supported for {where}: its hidden states overflow; use bfloat16"
        )
    if family.has_experts and source.get("router_jitter_noise"):
        raise UserError(
            f"{where}: config.json has router_jitter_noise, which differs on each rank; set it to 0"
        )


def _layer(
    number: int, marks: Sequence[TensorSpec | Attribute], shapes: Mapping[str, Shape], where: str
) -> LayerSpec:
    """Describes a layer by the marks of its family, of which it may lack tensors, and the shapes of its modules."""
    tensors = [mark for mark in marks if isinstance(mark, TensorSpec) and mark.name in shapes]
    specs: dict[str, TensorSpec] = {}
    unchanged: dict[str, TensorSpec] = {}
    # Linears come first, starting with those that lose groups. Then come other tensors that lose groups.
    for mark in sorted(tensors, key=lambda mark: (not mark.lora, not mark.spans)):
        if mark.lora or mark.spans or mark.name.endswith(".bias"):
            specs[mark.name] = mark
        else:  # also a linear that is marked twice, such as out_proj of a Mamba layer
            specs.pop(mark.name, None)
            unchanged[mark.name] = mark
        bias = f"{mark.linear}.bias"
        if mark.lora and bias in shapes:
            specs[bias] = TensorSpec(bias, mark.spans if mark.axis == 0 else ())
    # The others follow in the order of the modules.
    for name, shape in shapes.items():
        if name not in specs:
            if len(shape) == 2 and name not in unchanged:
                raise UserError(f"{where}{name} has shape {[*shape]}, but its family has nothing")
            specs[name] = unchanged.get(name, TensorSpec(name))
    layer = tuple(replace(spec, shape=shapes[name]) for name, spec in specs.items())
    for spec in layer:
        _check_spans(spec, where)
    kinds = {kind for spec in layer for kind in spec.kinds}
    attributes = (mark for mark in marks if isinstance(mark, Attribute) and mark.span.kind in kinds)
    return LayerSpec(number, layer, tuple(attributes))


def _check_spans(spec: TensorSpec, where: str) -> None:
    """Checks that the groups of a tensor fill its axis."""
    size = sum(span.size for span in spec.spans)
    if spec.spans and size != spec.shape[spec.axis]:
        expected = list(spec.shape)
        expected[spec.axis] = size
        raise UserError(
            f"{where}{spec.name} has shape {[*spec.shape]}, but its family has {expected}"
        )


def _kinds(marks: Marks, layers: Sequence[LayerSpec]) -> tuple[Kind, ...]:
    """Returns the kinds of the model in the order of the forward. The last makes up for what whole groups cannot."""
    present = {kind for layer in layers for kind in layer.counts}
    kinds: dict[Kind, None] = {}
    for mark in marks:
        if isinstance(mark, TensorSpec) and mark.lora:
            kinds |= dict.fromkeys(span.kind for span in mark.spans if span.kind in present)
    return tuple(kinds)


def read_family(config: JsonObject, where: str) -> Family:
    """Returns the family of config.json. Raises UserError if the family, or a sort of layer in it, is not supported."""
    text_parts = f" (and pruned), and the text part of {', '.join(MULTIMODAL)}"
    family = find_family(config.get("model_type"), where, text_parts)
    if "EncoderModel" in str(config.get("architectures")):
        raise UserError(
            f"{where}: config.json names an encoder without its decoder; only both together can be tuned"
        )
    supported = {*dir(config_class(config["model_type"])), *_aliases(config)}
    for field in OTHER_LAYERS:
        if config.get(field) and field not in supported:
            raise UserError(f"{where}: config.json has {field}: such layers are not supported")
    return family


def _aliases(config: JsonObject) -> dict[str, str]:
    """Returns other names of fields, to and from those that transformers' class has."""
    names = config_class(config["model_type"]).attribute_map
    return names | {name: alias for alias, name in names.items()}


def _check_sizes(config: JsonObject, family: Family, where: str) -> bool:
    """Checks the sizes in config.json. Returns True if single query heads leave."""
    aliases = _aliases(config)
    required = [name if name in config else aliases.get(name, name) for name in family.required]
    required += [layers.count for layers in family.layer_lists]
    try:
        per_layer = {int(i): sizes for i, sizes in (config.get(family.per_layer) or {}).items()}
        if min([int(config[name]) for name in required]) < 1:
            raise UserError(f"{where}: config.json holds a size below 1")
        if "num_attention_heads" not in family.required:
            return False
        is_fixed = "heads" in family.fixed or config.get(QUERY_HEADS_LEAVE) is False
        return _check_heads(config, per_layer, where) and not is_fixed
    except KeyError as error:
        raise UserError(f"{where}: config.json has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where}: config.json holds a size that is not a number: {error}"
        ) from None


def _check_heads(config: JsonObject, per_layer: Mapping[int, JsonObject], where: str) -> bool:
    """Checks the heads of all layers. Returns True if single query heads are the groups.

    They are if no layer has more than FEW_HEADS key-value heads, and if a query head is the finer step: each key-value
    head has more of them than a layer has key-value heads. They remain so once layers differ in that.
    """
    hidden = int(config.get("hidden_size") or 1)
    queries = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or hidden // queries)
    most_heads = int(config.get("num_key_value_heads") or queries)
    if head_dim < 1:
        raise UserError(f"{where}: config.json holds a size below 1")
    ratios: set[float] = set()
    for i, sizes in {0: {}, **per_layer}.items():
        layer = config | sizes
        queries = int(layer["num_attention_heads"])
        heads = int(layer.get("num_key_value_heads") or queries)
        ratios.add(queries / heads)
        if queries % heads or (most_heads > FEW_HEADS and len(ratios) > 1):
            raise UserError(
                f"{where}: layer {i} has {queries} query heads for {heads} key-value heads; every layer must have "
                "the same whole number of query heads per key-value head"
            )
    if head_dim % 2:
        raise UserError(
            f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even number"
        )
    return most_heads <= FEW_HEADS and (len(ratios) > 1 or max(ratios) > most_heads)
