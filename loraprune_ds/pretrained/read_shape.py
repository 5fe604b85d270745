"""Reads a model's sizes: what its family says of each layer, and the shapes of modules without weights."""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json
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


def read_model_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Reads config.json alone. No weight is read or downloaded.

    Args:
        model: a folder, a hub id, or a name of LLAMA_SIZES.
    """
    if model in LLAMA_SIZES:
        return {"model_type": "llama", "vocab_size": 32_000} | dict(
            zip(SIZES, LLAMA_SIZES[model], strict=True)
        )
    return read_json(
        locate_model(ModelConfig(model, revision=revision), "model: ", ["config.json"])
        / "config.json"
    )


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """Returns the shape of `read_model` alone."""
    return read_model(config, where)[0]


def read_model(config: dict[str, Any], where: str) -> tuple[ModelShape, PreTrainedModel]:
    """Reads `config.json` of a supported model or of the text part of a multimodal one, with the sizes of its layers.

    Returns the shape, and the modules on the meta device that it was read from.

    Raises:
        UserError: the model type is not supported. A size is missing or impossible. Key-value heads do not divide query
            heads. transformers refuses the config. A tensor has a shape that its family does not explain. The line
            names `where`, the folder or hub id.
    """
    config = text_config(config, where)
    family = read_family(config, where)
    config, counts, queries_leave = _checked(config, family, where)
    with refused_in_one_line(where):
        made, modules = (
            config_object(config | {QUERY_HEADS_LEAVE: queries_leave}),
            build_on_meta(config),
        )
    configs = [_layer_config(made, family, i) for i in range(sum(counts))]
    shapes: dict[str, Shape] = {
        name: tuple(parameter.shape) for name, parameter in modules.named_parameters()
    }
    layers, marks = list[LayerSpec](), [list(family.layer(c, i)) for i, c in enumerate(configs)]
    equal = dict[LayerSpec, LayerSpec]()
    for number, (names, count) in enumerate(zip(family.layer_lists, counts, strict=True)):
        for prefix in (f"{names.path}.{i}." for i in range(count)):
            inside = {
                name.removeprefix(prefix): shape
                for name, shape in shapes.items()
                if name.startswith(prefix)
            }
            layer = _layer(number, marks[len(layers)], inside, f"{where}: {prefix}")
            layers.append(equal.setdefault(layer, layer))
    paths = tuple(f"{names.path}." for names in family.layer_lists)
    outer = tuple(
        TensorSpec(name, shape=shape)
        for name, shape in shapes.items()
        if not name.startswith(paths)
    )
    kinds = _kinds(marks[0], layers)
    if isinstance(family, Moe) and not family.optional and "experts" not in kinds:
        raise UserError(f"{where}: no layer has experts; save the model as one of a dense family")
    return ModelShape(config["model_type"], kinds, tuple(layers), outer, configs[0]), modules


def check_depth(config: dict[str, Any], family: Family, names: Collection[str], where: str) -> None:
    """Checks that the files hold the last layer that config.json counts, before any is built."""
    for layers in family.layer_lists:
        count = config.get(layers.count)
        if isinstance(count, int) and count > 0:
            last = f"{layers.path}.{count - 1}."
            lacks = (
                f"{where}: tensor {last}* is missing, but config.json says {layers.count} {count}"
            )
            require(any(name.startswith(last) for name in names), lacks)


def check_family(
    family: Family, source: dict[str, Any], where: str, dtype: str, *, packing: bool
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
    number: int, marks: Sequence[TensorSpec | Attribute], inside: Mapping[str, Shape], where: str
) -> LayerSpec:
    """Describes a layer by the marks of its family, of which it may lack tensors, and the shapes of its modules."""
    tensors = [mark for mark in marks if isinstance(mark, TensorSpec) and mark.name in inside]
    named = dict[str, TensorSpec]()
    # Linears come first, starting with those that lose groups. Then come other tensors that lose groups.
    for mark in sorted(tensors, key=lambda x: (not x.lora, not x.spans)):
        named[mark.name] = mark
        if mark.lora and (bias := f"{mark.linear}.bias") in inside:
            named[bias] = TensorSpec(bias, mark.spans if mark.axis == 0 else ())
    first = [
        name for name, mark in named.items() if mark.lora or mark.spans or name.endswith(".bias")
    ]
    every = dict.fromkeys((*first, *inside))
    specs = tuple(replace(named.get(name, TensorSpec(name)), shape=inside[name]) for name in every)
    for spec in specs:
        along, axis = sum(run.size for run in spec.spans), spec.axis
        is_unmarked = len(spec.shape) == 2 and spec.name not in named
        if is_unmarked or (spec.spans and along != spec.shape[axis]):
            explained = (
                [*spec.shape[:axis], along, *spec.shape[axis + 1 :]] if spec.spans else "nothing"
            )
            raise UserError(
                f"{where}{spec.name} has shape {[*spec.shape]}, but its family has {explained}"
            )
    kinds = {kind for spec in specs for kind in spec.kinds}
    attributes = (mark for mark in marks if isinstance(mark, Attribute) and mark.span.kind in kinds)
    return LayerSpec(number, specs, tuple(attributes))


def _kinds(marks: Marks, layers: Sequence[LayerSpec]) -> tuple[Kind, ...]:
    """Returns the kinds of the model in the order of the forward. The last makes up for what whole groups cannot."""
    found = {kind for layer in layers for kind in layer.counts}
    spans = (
        run for mark in marks if isinstance(mark, TensorSpec) and mark.lora for run in mark.spans
    )
    return tuple(dict.fromkeys(span.kind for span in spans if span.kind in found))


def read_family(config: dict[str, Any], where: str) -> Family:
    """Returns the family of config.json. Raises UserError if the family, or a sort of layer in it, is not supported."""
    others = f" (and pruned), and the text part of {', '.join(MULTIMODAL)}"
    family = find_family(config.get("model_type"), where, others)
    if "EncoderModel" in str(config.get("architectures")):
        raise UserError(
            f"{where}: config.json names an encoder without its decoder; only both together can be tuned"
        )
    known = {*dir(config_class(config["model_type"])), *_aliases(config)}
    if field := next(
        (field for field in OTHER_LAYERS if config.get(field) and field not in known), None
    ):
        raise UserError(f"{where}: config.json has {field}: such layers are not supported")
    return family


def _aliases(config: dict[str, Any]) -> dict[str, str]:
    """Returns other names of fields, to and from those that transformers' class has."""
    names = config_class(config["model_type"]).attribute_map
    return {**names, **{name: alias for alias, name in names.items()}}


def _layer_config(made: PreTrainedConfig, family: Family, layer: int) -> Any:
    """Returns transformers' object of one layer."""
    if family.per_layer == "per_layer_config":
        return layer_config(made, layer)
    own = copy.copy(made)
    own.__dict__.update((getattr(made, family.per_layer, None) or {}).get(str(layer), {}))
    return own


def _checked(
    config: dict[str, Any], family: Family, where: str
) -> tuple[dict[str, Any], list[int], bool]:
    """Checks sizes. Returns config.json with explicit ones, the counts of layers, and if single query heads leave."""
    aliases, queries_leave = _aliases(config), False
    try:
        config = family.explicit(config)
        per_layer = {int(i): own for i, own in (config.get(family.per_layer) or {}).items()}
        sizes = [int(config[x if x in config else aliases.get(x, x)]) for x in family.required]
        counts = [int(config[names.count]) for names in family.layer_lists]
        if min(*counts, *sizes) < 1:
            raise UserError(f"{where}: config.json holds a size below 1")
        if "num_attention_heads" in family.required:
            is_fixed = "heads" in family.fixed or config.get(QUERY_HEADS_LEAVE) is False
            queries_leave = _check_heads(config, per_layer, where) and not is_fixed
    except KeyError as error:
        raise UserError(f"{where}: config.json has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{where}: config.json holds a size that is not a number: {error}"
        ) from None
    return config, counts, queries_leave


def _check_heads(
    config: dict[str, Any], per_layer: Mapping[int, dict[str, Any]], where: str
) -> bool:
    """Checks the heads of all layers. Returns True if single query heads are the groups.

    They are if no layer has more than FEW_HEADS key-value heads, and if a query head is the finer step: each key-value
    head has more of them than a layer has key-value heads. They remain so once layers differ in that.
    """
    hidden, queries = (
        int(config.get(field) or 1) for field in ("hidden_size", "num_attention_heads")
    )
    head_dim, most = (
        int(config.get("head_dim") or hidden // queries),
        int(config.get("num_key_value_heads") or queries),
    )
    if head_dim < 1:
        raise UserError(f"{where}: config.json holds a size below 1")
    each = set[float]()
    for i, own in {0: dict[str, Any](), **per_layer}.items():
        queries = int((config | own)["num_attention_heads"])
        heads = int((config | own).get("num_key_value_heads") or queries)
        each.add(queries / heads)
        if queries % heads or (most > FEW_HEADS and len(each) > 1):
            raise UserError(
                f"{where}: layer {i} has {queries} query heads for {heads} key-value heads; every layer must have "
                "the same whole number of query heads per key-value head"
            )
    if head_dim % 2:
        raise UserError(
            f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even number"
        )
    return most <= FEW_HEADS and (len(each) > 1 or max(each) > most)
