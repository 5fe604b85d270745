"""The ratio of a run, from `prune.ratio`, `prune.target` or `prune.sizes`."""

import math
from dataclasses import dataclass, replace
from typing import Any

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import EQUAL_LAYERS, LayerCounts
from loraprune_ds.model.shape import ModelShape, cached_numel, state_numel
from loraprune_ds.pruning.limits import (
    Bounds,
    Limits,
    check_reachable,
    limits_without_ratio,
    reachable,
    resolve_refit,
    with_ratio,
)
from loraprune_ds.pruning.ranking import shape_of_uniform, uniform_goal
from loraprune_ds.units import Amount, read_amount

BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


def resolve(config: PruneConfig, dense: ModelShape, *, tower: bool = False) -> tuple[PruneConfig, Limits]:
    """Fills in `prune.ranking` and `prune.compensate`, and makes the limits. Raises the errors of `make_limits`.

    Args:
        tower: True if the result has the tower of a multimodal model.
    """
    equal = dense.family.equal_layers
    if config.ranking is None:
        config = replace(config, ranking="uniform" if tower or equal else "global")
    limits = make_limits(config, dense)
    if equal:
        final = final_shape(config, limits)
        fits = final is not None and final.is_uniform
        require(fits, f"{dense.model_type} needs layers of one size: set {EQUAL_LAYERS}")
    return resolve_refit(config, limits), limits


def final_shape(config: PruneConfig, limits: Limits) -> ModelShape | None:
    """Returns the shape that a run ends with. None if scores decide what each layer keeps."""
    return shape_of_uniform(limits) if config.ranking == "uniform" else None


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits of a run. The ratio is `prune.ratio`, or follows from `prune.target` or the largest size.

    Raises UserError if settings conflict, or if the ratio or target is out of reach. The message names the largest
    ratio or the smallest size.
    """
    limits = limits_without_ratio(config, dense)
    config = with_largest_size(config, limits)
    ratio = config.ratio
    if config.target is not None:
        ratio = _find_ratio(config, limits, "prune.sizes" if config.sizes else "prune.target", config.target)
    assert ratio is not None, "the config has a ratio or a target"
    limits = with_ratio(config, limits, ratio)
    check_reachable(config, limits)
    return limits


def with_largest_size(config: PruneConfig, limits: Limits) -> PruneConfig:
    """Sets ratio or target to the size that removes most. Raises UserError if the config sets another one."""
    if config.sizes is None:
        return config
    largest = max(config.sizes, key=lambda size: _ratio_of(config, limits, size))
    ratio = _fraction(largest)
    target = None if ratio else largest
    for key, given, own in (("ratio", config.ratio, ratio), ("target", config.target, target)):
        other = f"prune.{key} {given} is not the largest cut of prune.sizes, which is {largest}; remove it"
        require(given in (None, own), other)
    return replace(config, ratio=ratio, target=target)


@dataclass(frozen=True)
class Size:
    """One size that a run makes, or its only one."""

    name: str | None  # as given in `prune.sizes`. None: the run has no sizes
    place: int  # in `prune.sizes`
    ratio: float  # removed fraction of the dense linear parameters
    bounds: Bounds | None = None  # `uniform`: the equal counts at its end and at its start


def plan_sizes(config: PruneConfig, limits: Limits) -> list[Size]:
    """Lists the sizes of a run, ordered by what they remove. Raises UserError for equal sizes.

    With `uniform` the counts of each lie between those of the size before and of the last, so no count grows.
    """
    end, start = uniform_goal(limits, limits.ratio) if config.ranking == "uniform" else None, limits.open_counts
    if config.sizes is None:
        return [Size(None, 0, limits.ratio, None if end is None else (end, start))]
    places = range(len(config.sizes))
    sizes, names, before = list[Size](), config.sizes, 0.0
    for place in sorted(places, key=lambda i: _ratio_of(config, limits, names[i])):
        bounds, is_last = None if end is None else (end, start), len(sizes) + 1 == len(names)
        ratio = limits.ratio if is_last else _ratio_of(config, limits, names[place], bounds)
        if bounds is not None:
            bounds = (uniform_goal(limits, ratio, bounds), start)
        removes = ratio > before and (bounds is None or bounds[0] != start)
        least = f"removes no more than {sizes[-1].name}" if sizes else "is too small to change a width"
        require(removes, f"prune.sizes: {names[place]} {least}")
        sizes.append(Size(names[place], place, ratio, bounds))
        before, start = ratio, start if bounds is None else bounds[0]
    return sizes


def _fraction(size: str) -> float | None:
    """Returns the fraction to remove. None if the size is a number of parameters or memory."""
    amount = read_amount(size, "prune.sizes")
    return amount.value if amount.unit == "parameters" and amount.value < 1 else None


def _ratio_of(config: PruneConfig, limits: Limits, size: str, bounds: Bounds | None = None) -> float:
    """Returns the ratio that one of `prune.sizes` removes."""
    fraction, free = _fraction(size), replace(config, head_ratio=None)  # all sizes have the shares of the last
    return _find_ratio(free, limits, "prune.sizes", size, bounds) if fraction is None else fraction


def _find_ratio(config: PruneConfig, limits: Limits, key: str, asked: str, bounds: Bounds | None = None) -> float:
    """Finds the ratio that reaches a number of parameters or the memory of a server.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of the target.
    """
    amount, numel = read_amount(asked, key), limits.dense.linear_numel()
    size = measure(config, limits.dense, amount)
    if size <= amount.value:
        raise UserError(f"{key} {asked} removes nothing from the dense model, which has {amount.format(size)}")

    def size_at(ratio: float) -> float:
        at = with_ratio(config, limits, ratio)
        if config.ranking == "uniform":
            return measure(config, shape_of_uniform(at, bounds), amount)
        return _size_of_global(config, at, amount)

    least, most = (gone / numel for gone in reachable(config, limits))
    narrowest = size_at(most) if most > 0 else size
    if narrowest > amount.value:
        keeps = f"protected layers and minimum widths at least {amount.format(narrowest)} stay"
        raise UserError(f"{key} {asked} is out of reach: with the {keeps}")
    low, high = least, most
    while high - low > 0.5 / numel:  # `high` fits
        middle = (low + high) / 2
        low, high = (middle, high) if size_at(middle) > amount.value else (low, middle)
    if least and high - least < 1 / numel:
        raise UserError(f"prune.head_ratio {config.head_ratio} alone removes more than {key} {asked} asks for")
    return high


def _size_of_global(config: PruneConfig, limits: Limits, amount: Amount) -> float:
    """Returns the size after each kind has lost its share, from any layers."""
    dense, leaving = limits.dense, limits.leaving(limits.ratio)
    size = dense_size = measure(config, dense, amount)
    for kind, share in limits.shares.items():
        index = max(range(len(dense.layers)), key=lambda i: dense.counts[i][kind])  # some layers lack this kind
        layers = list(dense.counts)
        layers[index] = LayerCounts({**layers[index], kind: layers[index][kind] - 1})
        of_a_group = dense_size - measure(config, dense.resized(layers), amount)
        size -= of_a_group * leaving * share / dense.group_numel(kind)
    return size


def server_memory(config: PruneConfig, shape: ModelShape) -> dict[str, float]:
    """Counts the bytes on a server, for the weights and for a KV cache of `prune.target_context` tokens.

    Delta nets have a state for each sequence instead. One state counts.
    """
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    return {"weights": weights, "kv_cache": BYTES * cached_numel(shape) * config.target_context + _state_bytes(shape)}


def on_a_server(config: PruneConfig, shape: ModelShape, memory: float) -> dict[str, float]:
    """Returns the bytes of weights, and how many tokens of KV cache fit into the rest of `memory` bytes."""
    weights = server_memory(config, shape)["weights"]
    tokens = max(0, math.floor((memory - weights - _state_bytes(shape)) / (BYTES * cached_numel(shape))))
    return {"parameters": shape.total_numel(), "weights": weights, "tokens": tokens}


def _state_bytes(shape: ModelShape) -> int:
    return 4 * state_numel(shape)


def measure(config: PruneConfig, shape: ModelShape, amount: Amount) -> float:
    """Returns the size of a model in the unit of an amount."""
    return sum(server_memory(config, shape).values()) if amount.unit == "bytes" else shape.total_numel()


def describe_target(config: PruneConfig, dense: ModelShape, pruned: ModelShape) -> dict[str, Any] | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {"asked": config.target, "unit": amount.unit, "value": amount.value}
    entry |= {"dense": measure(config, dense, amount), "reached": measure(config, pruned, amount)}
    return entry | (server_memory(config, pruned) if amount.unit == "bytes" else {})
