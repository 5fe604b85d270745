"""Reads a model's sizes: its counts from config.json, and every parameter's shape from modules without weights."""

from dataclasses import replace
from typing import Any, cast

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import build_on_meta, config_class, refused_in_one_line
from loraprune_ds.model.family import find_family
from loraprune_ds.model.family_row import Family, Width
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape, Sizes
from loraprune_ds.model.text_part import MULTIMODAL, text_config

EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts")
REFUSED = ("kv_lora_rank", "linear_num_key_heads")


def shape_from_config(config: dict[str, Any], where: str) -> ModelShape:
    """Reads `config.json` of a supported model, `per_layer_config` included. Of a multimodal one only the text part.

    Raises:
        UserError: the model type is not supported. A size is missing or impossible. Key-value heads do not divide query
            heads. transformers refuses the config. A tensor has a shape that family.py does not explain. The line
            names `where`, the folder or hub id.
    """
    config = text_config(config, where)
    family = _find_family(config, where)
    try:
        num_layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
        given = cast(dict[str, dict[str, Any]], config.get("per_layer_config") or {})
        config, per_layer = _old_names(config, family), {int(k): _old_names(v, family) for k, v in given.items()}
        defaults = config_class(config["model_type"])
        sizes = [_layer_sizes(config | per_layer.get(i, {}), defaults, family) for i in range(num_layers)]
        vocab_size = int(config["vocab_size"])
        widths = _widths(config, defaults, family)
        head_dim = widths.get("head") or config.get("head_dim", getattr(defaults, "head_dim", None))
        head_dim = int(head_dim or hidden // int(config["num_attention_heads"]))
        of_experts = _expert_sizes(config, defaults, family)
    except KeyError as error:
        raise UserError(f"{where}: config.json has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{where}: config.json holds a size that is no number: {error}") from None
    if min(num_layers, hidden, vocab_size, head_dim, *(n for queries, x in sizes for n in (queries, *x.values()))) < 1:
        raise UserError(f"{where}: config.json holds a size below 1")
    _check_heads(where, sizes, head_dim)
    parameters = _meta_parameters(config, where)
    shape = ModelShape(
        model_type=config["model_type"],
        hidden_size=hidden,
        head_dim=head_dim,
        queries_per_group=sizes[0][0] // sizes[0][1]["heads"],
        vocab_size=vocab_size,
        tie_word_embeddings="lm_head.weight" not in parameters,
        layers=_held_layers(where, [layer for _, layer in sizes], parameters, family),
        absent=frozenset(
            x.name for x in family.linears if x.optional and f"model.layers.0.{x.name}.weight" not in parameters
        ),
        widths=widths,
        **of_experts,
    )
    return _add_parameters(shape, parameters, where)


def check_family(config: RunConfig, family: Family, source: dict[str, Any], where: str) -> None:
    """Checks that a run asks for nothing that this family lacks, or that would have no effect. `source` is config.json.

    Raises:
        UserError: it does. The line names `where`, the folder or hub id.
    """
    prune = config.prune
    if config.data.packing and not family.packs:
        raise UserError(f"data.packing is not supported for {where}: its class in transformers lets samples meet")
    if family.mixture is None:
        return
    heads_leave = prune.head_ratio and "heads" not in family.fixed
    if prune.compensate != "none" and not heads_leave:
        raise UserError(
            f"prune.compensate: least_squares makes up for heads and not for experts, and all heads of {where} stay; "
            "set prune.head_ratio, or prune.compensate: none"
        )
    if source.get("router_jitter_noise"):
        raise UserError(f"{where}: config.json has router_jitter_noise, which each rank would draw anew; set it to 0")


def _meta_parameters(config: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of all parameters, each once, from modules without weights.

    Raises:
        UserError: transformers refuses the config. Or the model needs tensors on disk that are no parameters, which
            nothing here reads or exports.
    """
    with refused_in_one_line(where):
        model = build_on_meta(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied head under both of its names
    if buffers := sorted(model.state_dict().keys() - parameters.keys()):
        raise UserError(f"{where}: weight files hold the buffer {buffers[0]}; such models are not supported")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _find_family(config: dict[str, Any], where: str) -> Family:
    family = find_family(
        config.get("model_type"), where, f" (and pruned), and the text part of {', '.join(MULTIMODAL)}"
    )
    known = {field for fields in family.widths.values() for field in fields}
    refused = {*REFUSED, *(() if family.mixture else EXPERT_FIELDS)} - known
    if found := next((key for key in refused if config.get(key)), None):
        raise UserError(f"{where}: config.json has {found}: such layers are not supported")
    return family


def _held_layers(where: str, sizes: list[LayerShape], parameters: Sizes, family: Family) -> tuple[LayerShape, ...]:
    """Returns the groups that each layer has. It has those of a kind if it has a linear of that kind.

    Kinds that no layer has are left out.
    """
    held = [
        {x.kind for x in family.linears if f"model.layers.{i}.{x.name}.weight" in parameters} for i in range(len(sizes))
    ]
    kinds = [kind for kind in family.kinds if any(kind in own for own in held)]
    if family.mixture and "experts" not in kinds:
        raise UserError(f"{where}: no layer has experts; such a model is saved as one of a dense family")
    return tuple(
        LayerShape((kind, layer[kind] if kind in own else 0) for kind in kinds)
        for layer, own in zip(sizes, held, strict=True)
    )


def _check_heads(where: str, sizes: list[tuple[int, LayerShape]], head_dim: int) -> None:
    for i, (queries, layer) in enumerate(sizes):
        heads = layer["heads"]
        if queries % heads or queries // heads != sizes[0][0] // sizes[0][1]["heads"]:
            raise UserError(
                f"{where}: layer {i} has {queries} query heads for {heads} key-value heads; every layer must have "
                "the same whole number of query heads per key-value head"
            )
    if head_dim % 2:
        raise UserError(f"{where}: head_dim {head_dim} is odd; rotary embeddings need an even one")


def _layer_sizes(config: dict[str, Any], defaults: Any, family: Family) -> tuple[int, LayerShape]:
    """Returns the query heads of a layer, and its groups. Each query head has its own key-value head by default."""
    queries = int(config["num_attention_heads"])
    heads = config.get("num_key_value_heads", getattr(defaults, "num_key_value_heads", None)) or queries
    counts = config | {"num_key_value_heads": heads}
    return queries, LayerShape((kind, int(counts[family.count_field(kind)])) for kind in family.kinds)


def _old_names(config: dict[str, Any], family: Family) -> dict[str, Any]:
    """Gives the count of experts the name that both versions of transformers read."""
    mixture = family.mixture
    if mixture is None or mixture.new_count not in config:
        return config
    return config | {mixture.count: config[mixture.new_count]}


def _widths(config: dict[str, Any], defaults: Any, family: Family) -> dict[Width, int]:
    """Returns the family's own widths. A field that is null counts as 0: what it measures is not there."""
    return {
        width: sum(int(config.get(field, getattr(defaults, field)) or 0) for field in fields)
        for width, fields in family.widths.items()
    }


def _expert_sizes(config: dict[str, Any], defaults: Any, family: Family) -> dict[str, Any]:
    """Returns what a `ModelShape` has of experts. Nothing without them."""
    if family.mixture is None:
        return {}
    groups, chosen = (
        int(config.get(field, getattr(defaults, field))) if family.mixture.grouped else 1
        for field in ("n_group", "topk_group")
    )
    per_token = int(config["num_experts_per_tok"])
    of_each = max(2 * family.mixture.grouped, -(-per_token // chosen))  # which the router compares by their best two
    return {
        "expert_size": int(config[family.mixture.size]),
        "experts_per_token": per_token,
        "least_experts": groups * of_each,
        "expert_groups": groups,
    }


def _add_parameters(shape: ModelShape, found: Sizes, where: str) -> ModelShape:
    """Adds the biases, and the parameters that no cut makes smaller.

    Raises:
        UserError: a tensor has a shape that the family's table does not explain. Or layers differ in what they hold.
    """
    shape = replace(
        shape,
        biases=frozenset(x.name for i, x in shape.linear_ids() if f"model.layers.{i}.{x.name}.bias" in found),
        ends={name: size for name, size in found.items() if not name.startswith("model.layers.")},
    )
    first = {layer.kinds: i for i, layer in reversed([*enumerate(shape.layers)])}
    shape = replace(shape, layer_others={kinds: _whole(shape, i, found) for kinds, i in first.items()})
    expected = shape.parameters()
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            sizes = [list(some[name]) if name in some else "nothing" for some in (found, expected)]
            raise UserError(f"{where}: {name} has shape {sizes[0]}, where a {shape.model_type} layer has {sizes[1]}")
    return shape


def _whole(shape: ModelShape, layer: int, found: Sizes) -> Sizes:
    """Finds what no cut makes smaller in a layer: vectors, and the matrices that the family names."""
    prefix, cut = f"model.layers.{layer}.", shape.layer_parameters(layer)
    inside = {name.removeprefix(prefix): size for name, size in found.items() if name.startswith(prefix)}
    return {
        name: size
        for name, size in inside.items()
        if (len(size) < 2 or name.startswith(shape.family.whole)) and prefix + name not in cut
    }
