"""How much a run removes in all: `prune.ratio`, or the ratio that brings the model down to `prune.target`."""

import math
from dataclasses import replace
from typing import Any

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.flops import cached_numel, state_numel
from loraprune_ds.model.shapes import EQUAL_LAYERS, LayerShape, ModelShape
from loraprune_ds.pruning.limits import (
    Limits,
    check_reachable,
    limits_without_ratio,
    reachable,
    resolve_refit,
    with_ratio,
)
from loraprune_ds.pruning.ranking import shape_of_uniform
from loraprune_ds.units import Amount

BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


def resolve(config: PruneConfig, dense: ModelShape, *, tower: bool = False) -> tuple[PruneConfig, Limits]:
    """Fills in `prune.ranking` and `prune.compensate`, and makes the limits. Raises UserError as `make_limits`.

    Args:
        tower: whether the result has the tower of a multimodal model.
    """
    equal = dense.family.equal_layers
    if config.ranking is None:
        config = replace(config, ranking="uniform" if tower or equal else "global")
    limits = make_limits(config, dense)
    if equal:
        final = final_shape(config, limits)
        fits = final is not None and final.is_uniform
        require(fits, f"{dense.model_type} has layers of one size: set {EQUAL_LAYERS}")
    return resolve_refit(config, limits), limits


def final_shape(config: PruneConfig, limits: Limits) -> ModelShape | None:
    """Returns the shape that a run ends with. None if scores decide what each layer keeps."""
    return shape_of_uniform(limits) if config.ranking == "uniform" else None


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits of a run, whose ratio is `prune.ratio` or follows from `prune.target`.

    Raises UserError if settings conflict, or if the ratio or target is out of reach. The message names the largest
    ratio or the smallest size.
    """
    limits, amount = limits_without_ratio(config, dense), config.target_amount
    ratio = config.ratio if amount is None else _find_ratio(config, limits, amount)
    assert ratio is not None, "the config has a ratio or a target"
    limits = with_ratio(config, limits, ratio)
    check_reachable(config, limits)
    return limits


def _find_ratio(config: PruneConfig, limits: Limits, amount: Amount) -> float:
    """Finds the ratio that reaches `prune.target`.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of it.
    """
    size, numel = measure(config, limits.dense), limits.dense.linear_numel()
    if size <= amount.value:
        has = amount.format(size)
        raise UserError(f"prune.target {config.target} takes nothing from the dense model, which has {has}")
    least, most = (gone / numel for gone in reachable(config, limits))
    size_at = _size_of_uniform if config.ranking == "uniform" else _size_of_global
    narrowest = size_at(config, with_ratio(config, limits, most)) if most > 0 else size
    if narrowest > amount.value:
        keeps = f"protected layers and minimum widths at least {amount.format(narrowest)} stay"
        raise UserError(f"prune.target {config.target} is out of reach: with the {keeps}")
    low, high = least, most
    while high - low > 0.5 / numel:  # `high` fits
        middle = (low + high) / 2
        too_large = size_at(config, with_ratio(config, limits, middle)) > amount.value
        low, high = (middle, high) if too_large else (low, middle)
    if config.head_ratio and high - least < 1 / numel:
        raise UserError(f"prune.head_ratio {config.head_ratio} alone takes more than prune.target {config.target} asks")
    return high


def _size_of_uniform(config: PruneConfig, limits: Limits) -> float:
    """Returns the size at the final widths of `uniform`."""
    return measure(config, shape_of_uniform(limits))


def _size_of_global(config: PruneConfig, limits: Limits) -> float:
    """Returns the size once each kind has lost its share, from whichever layers."""
    dense, leaving = limits.dense, limits.ratio * limits.dense.linear_numel()
    size = dense_size = measure(config, dense)
    for kind, share in limits.shares.items():
        index = max(range(len(dense.layers)), key=lambda i: dense.layers[i][kind])  # some have no groups of this kind
        layers = list(dense.layers)
        layers[index] = LayerShape({**layers[index], kind: layers[index][kind] - 1})
        of_a_group = dense_size - measure(config, dense.with_layers(tuple(layers)))
        size -= of_a_group * leaving * share / dense.group_numel(kind)
    return size


def server_memory(config: PruneConfig, shape: ModelShape) -> dict[str, float]:
    """Counts the bytes on a server: of the weights, and of a KV cache of `prune.target_context` tokens.

    Delta nets have a state for each sequence instead. That of one counts.
    """
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    return {"weights": weights, "kv_cache": BYTES * cached_numel(shape) * config.target_context + _state_bytes(shape)}


def on_a_server(config: PruneConfig, shape: ModelShape, memory: float) -> dict[str, float]:
    """Returns the bytes of weights, and the tokens of KV cache that fit into the rest of `memory` bytes."""
    weights = server_memory(config, shape)["weights"]
    tokens = max(0, math.floor((memory - weights - _state_bytes(shape)) / (BYTES * cached_numel(shape))))
    return {"parameters": shape.total_numel(), "weights": weights, "tokens": tokens}


def _state_bytes(shape: ModelShape) -> int:
    return 4 * state_numel(shape)


def measure(config: PruneConfig, shape: ModelShape) -> float:
    """Returns the size of a model in the unit of `prune.target`."""
    in_bytes = config.target_amount is not None and config.target_amount.unit == "bytes"
    return sum(server_memory(config, shape).values()) if in_bytes else shape.total_numel()


def describe_target(config: PruneConfig, dense: ModelShape, pruned: ModelShape) -> dict[str, Any] | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {"asked": config.target, "unit": amount.unit, "value": amount.value}
    entry |= {"dense": measure(config, dense), "reached": measure(config, pruned)}
    return entry | (server_memory(config, pruned) if amount.unit == "bytes" else {})
