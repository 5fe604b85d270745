"""Reads a model's sizes: its counts from config.json, and every parameter's shape from modules without weights."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, cast

from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json
from loraprune_ds.model.classes import build_on_meta, config_class, config_object, refused_in_one_line
from loraprune_ds.model.family import FAMILIES, find_family
from loraprune_ds.model.family_row import Family, Linear, Width
from loraprune_ds.model.frozen import Matrix
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.shapes import LayerShape, ModelShape, Sizes
from loraprune_ds.model.text_part import MULTIMODAL, text_config

EXPERT_FIELDS = {family.mixture.count for family in FAMILIES.values() if family.mixture}
# A field of config.json -> the width that a family must have to support it.
NEEDED_WIDTHS: dict[str, Width] = {"kv_lora_rank": "key_value_rank", "linear_num_key_heads": "delta_key"}
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
        return {"model_type": "llama", "vocab_size": 32_000} | dict(zip(SIZES, LLAMA_SIZES[model], strict=True))
    return read_json(locate_model(ModelConfig(model, revision=revision), "model: ", ["config.json"]) / "config.json")


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """As `read_model`, without the modules."""
    return read_model(config, where)[0]


def read_model(config: dict[str, Any], where: str) -> tuple[ModelShape, PreTrainedModel]:
    """Reads `config.json` of a supported model or of the text part of a multimodal one, with its `per_layer_config`.

    Returns the shape, and the modules on the meta device that it was read from.

    Raises:
        UserError: the model type is not supported. A size is missing or impossible. Key-value heads do not divide query
            heads. transformers refuses the config. A tensor has a shape that family.py does not explain. The line
            names `where`, the folder or hub id.
    """
    config = text_config(config, where)
    family = read_family(config, where)
    try:
        depths = [int(config[layers.count]) for layers in family.layer_lists]
        overrides = cast(dict[str, dict[str, Any]], config.get(family.per_layer) or {})
        config, per_layer = _old_names(config, family), {int(k): _old_names(v, family) for k, v in overrides.items()}
        defaults = config_class(config["model_type"])
        sizes = [_layer_sizes(config | per_layer.get(i, {}), defaults, family) for i in range(sum(depths))]
        vocab_size = int(config["vocab_size"])
        widths, doubled = _of_class(config, where, family)
        hidden = int(widths.get("hidden") or config["hidden_size"])
        head_dim = widths.get("head") or config.get("head_dim", getattr(defaults, "head_dim", None))
        head_dim = int(head_dim or hidden // int(config["num_attention_heads"]))
        of_experts = _expert_sizes(config, defaults, family)
    except KeyError as error:
        raise UserError(f"{where}: config.json has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: config.json holds a size that is not a number: {error}") from None
    if min(*depths, hidden, vocab_size, head_dim, *(n for queries, x in sizes for n in (queries, *x.values()))) < 1:
        raise UserError(f"{where}: config.json holds a size below 1")
    _check_heads(where, sizes, head_dim)
    with refused_in_one_line(where):
        modules = build_on_meta(config)
    parameters: Sizes = {name: tuple(parameter.shape) for name, parameter in modules.named_parameters()}
    paths = [f"{layers.path}." for layers in family.layer_lists]
    inside = [[_inside(parameters, f"{path}{i}.") for i in range(n)] for path, n in zip(paths, depths, strict=True)]
    layers = [*chain(*inside)]
    shape = ModelShape(
        model_type=config["model_type"],
        hidden_size=hidden,
        head_dim=head_dim,
        queries_per_group=sizes[0][0] // sizes[0][1].get("heads", 1),
        vocab_size=vocab_size,
        tie_word_embeddings="lm_head.weight" not in parameters,
        layers=_layers(where, [layer for _, layer in sizes], layers, family),
        doubled=doubled,
        biases=frozenset(x.name for x in family.linears if any(f"{x.name}.bias" in names for names in layers)),
        outer_parameters={name: size for name, size in parameters.items() if not name.startswith(tuple(paths))},
        whole=dict(enumerate(_whole(family, names) for names in layers)),
        absent=tuple(frozenset(_absent(family, names)) for names in inside),
        shared_heads=sizes[0][0] if family.shared_bias else 0,
        encoder_layers=sum(depths[:-1]),
        widths=widths,
        **of_experts,
    )
    counted = (LayerShape((x, n * shape.times(i, x)) for x, n in y.items()) for i, y in enumerate(shape.layers))
    shape = shape.with_layers(tuple(counted))
    shape = replace(shape, layer_others={i: _others(shape, i, names) for i, names in enumerate(layers)})
    expected = shape.parameters()
    for name in sorted(expected.keys() | parameters.keys()):
        if parameters.get(name) != expected.get(name):
            actual, explained = (list(some[name]) if name in some else "nothing" for some in (parameters, expected))
            raise UserError(f"{where}: {name} has shape {actual}, but a {shape.model_type} layer has {explained}")
    return shape, modules


def check_depth(config: dict[str, Any], family: Family, names: Collection[str], where: str) -> None:
    """Checks that the files hold the last layer that config.json counts. To build a million layers takes a minute."""
    for layers in family.layer_lists:
        count = config.get(layers.count)
        if isinstance(count, int) and count > 0:
            last = f"{layers.path}.{count - 1}."
            lacks = f"{where}: tensor {last}* is missing, but config.json says {layers.count} {count}"
            require(any(name.startswith(last) for name in names), lacks)


def check_family(family: Family, source: dict[str, Any], where: str, dtype: str, *, packing: bool) -> None:
    """Checks that this family can do what a run asks for. `source` is config.json.

    Raises:
        UserError: it cannot. The line names `where`, the folder or hub id.
    """
    if packing and not family.packs:
        raise UserError(f"data.packing is not supported for {where}: its class in transformers mixes samples")
    if family.has_encoder and dtype == "float16":
        raise UserError(f"model.dtype float16 is not supported for {where}: its hidden states overflow; use bfloat16")
    if family.mixture and source.get("router_jitter_noise"):
        raise UserError(f"{where}: config.json has router_jitter_noise, which differs on each rank; set it to 0")


def _inside(parameters: Sizes, prefix: str) -> Sizes:
    return {name.removeprefix(prefix): size for name, size in parameters.items() if name.startswith(prefix)}


def read_family(config: dict[str, Any], where: str) -> Family:
    """Returns the family of config.json. Raises UserError if the family, or a sort of layer in it, is not supported."""
    family = find_family(
        config.get("model_type"), where, f" (and pruned), and the text part of {', '.join(MULTIMODAL)}"
    )
    if "EncoderModel" in str(config.get("architectures")):
        raise UserError(f"{where}: config.json names an encoder without its decoder; only both together can be tuned")
    refused = {field for field, width in NEEDED_WIDTHS.items() if width not in family.widths}
    refused |= EXPERT_FIELDS if family.mixture is None else set()
    if field := next((key for key in refused if config.get(key)), None):
        raise UserError(f"{where}: config.json has {field}: such layers are not supported")
    return family


def _layers(where: str, sizes: list[LayerShape], inside: list[Sizes], family: Family) -> tuple[LayerShape, ...]:
    """Returns the groups of each layer. It has groups of a kind if it has a linear of that kind."""
    own = [{x.kind for x in family.linears if f"{x.name}.weight" in names} for names in inside]
    kinds = [kind for kind in sizes[0] if any(kind in of_layer for of_layer in own)]
    if family.mixture and not family.mixture.optional and "experts" not in kinds:
        raise UserError(f"{where}: no layer has experts; save the model as one of a dense family")
    return tuple(
        LayerShape((kind, layer[kind] if kind in of_layer else 0) for kind in kinds)
        for layer, of_layer in zip(sizes, own, strict=True)
    )


def _absent(family: Family, inside: list[Sizes]) -> Iterator[str]:
    """Yields the names of optional linears and companions that no layer has."""
    for x in (*family.linears, *family.companions):
        parameter = f"{x.name}.weight" if isinstance(x, Linear) else x.name
        if x.optional and not any(parameter in names for names in inside):
            yield x.name


def _check_heads(where: str, sizes: list[tuple[int, LayerShape]], head_dim: int) -> None:
    for i, (queries, layer) in enumerate(sizes):
        heads = layer.get("heads", 1)
        if queries % heads or queries // heads != sizes[0][0] // sizes[0][1].get("heads", 1):
            raise UserError(
                f"{where}: layer {i} has {queries} query heads for {heads} key-value heads; every layer must have "
                "the same whole number of query heads per key-value head"
            )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even number")


def _layer_sizes(config: dict[str, Any], defaults: Any, family: Family) -> tuple[int, LayerShape]:
    """Returns the query heads of a layer, and its groups. By default each query head has its own key-value head."""
    queries = int(config[family.counts.get("heads", "num_attention_heads")])
    heads = config.get("num_key_value_heads", getattr(defaults, "num_key_value_heads", None)) or queries
    counts = config | {"num_key_value_heads": heads}
    fields = {kind: next(iter(family.count_fields(kind))) for kind in family.kinds}
    if family.mixture and family.mixture.optional and not config.get(fields["experts"]):
        del fields["experts"]
    return queries, LayerShape((kind, int(counts[field])) for kind, field in fields.items())


def _old_names(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Gives the count of experts the name that both versions of transformers read."""
    mixture = family.mixture
    if mixture is None or mixture.new_count not in config:
        return config
    return config | {mixture.count: config[mixture.new_count]}


def _of_class(config: dict[str, Any], where: str, family: Family) -> tuple[dict[Width, int], frozenset[int]]:
    """Returns the family's widths, and the layers with twice the channels."""
    if not family.widths and family.doubled is None:
        return {}, frozenset()
    with refused_in_one_line(where):
        made = config_object(config)
    doubled = family.doubled(made) if family.doubled else ()
    return {width: int(of(made)) for width, of in family.widths.items()}, frozenset(doubled)


def _expert_sizes(config: dict[str, Any], defaults: Any, family: Family) -> dict[str, Any]:
    """Returns the fields of a `ModelShape` about experts."""
    if family.mixture is None or (family.mixture.optional and not config.get(family.mixture.count)):
        return {}
    groups, chosen = (
        int(config.get(field, getattr(defaults, field)) or 1) if family.mixture.best_of_group else 1
        for field in ("n_group", "topk_group")
    )
    per_token = int(config[family.mixture.chosen])
    of_each = max(family.mixture.best_of_group, -(-per_token // chosen))
    return {
        "expert_size": int(config[family.mixture.size]),
        "experts_per_token": per_token,
        "least_experts": groups * of_each,
        "expert_groups": groups,
    }


def _whole(family: Family, inside: Sizes) -> dict[str, Matrix]:
    names = (x.name for x in family.linears if not x.parts and f"{x.name}.weight" in inside)
    return {name: cast(Matrix, inside[f"{name}.weight"]) for name in names}


def _others(shape: ModelShape, layer: int, inside: Sizes) -> Sizes:
    """Returns the other parameters that no cut makes smaller. An unknown matrix is not among them."""
    of_linears = _inside(shape.layer_parameters(layer), shape.prefix(layer))
    left = {name: size for name, size in inside.items() if name not in of_linears}
    known = [f"{name}.weight" for name in shape.family.without_lora]
    return {name: size for name, size in left.items() if len(size) != 2 or name in known}
