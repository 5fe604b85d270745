"""The sizes that a run makes, from `prune.ratio`, `prune.target` or `prune.sizes`."""

import math
from dataclasses import dataclass, replace
from typing import Any

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Amount, read_amount
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import EQUAL_LAYERS, LayerCounts
from loraprune_ds.model.shape import ModelShape, cached_numel, state_numel
from loraprune_ds.pruning.limits import (
    Bounds,
    Budget,
    Limits,
    check_reachable,
    make_budget,
    make_limits,
    reachable,
)
from loraprune_ds.pruning.ranking import uniform_goal

BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


@dataclass(frozen=True)
class Size:
    """One size that a run makes, or its only one."""

    name: str | None  # as given in `prune.sizes`. None: the run has no sizes
    place: int  # in `prune.sizes`
    budget: Budget
    bounds: Bounds | None = None  # `uniform`: the equal counts at its end and at its start


def resolve(
    config: PruneConfig, dense: ModelShape, *, tower: bool = False
) -> tuple[PruneConfig, Limits, list[Size]]:
    """Fills in `prune.ranking` and `prune.compensate`, and decides the limits and the sizes of a run.

    Args:
        tower: True if the result has the tower of a multimodal model.

    Raises:
        UserError: settings conflict or do not fit the model, or a ratio or target is out of reach. The message names
            the largest ratio or the smallest size.
    """
    equal = dense.family.equal_layers
    if config.ranking is None:
        config = replace(config, ranking="uniform" if tower or equal else "global")
    limits = make_limits(config, dense)
    sizes = make_sizes(config, limits)
    final = final_shape(limits, sizes)
    fits = not equal or (final is not None and final.is_uniform)
    require(fits, f"{dense.model_type} needs layers of one size: set {EQUAL_LAYERS}")
    refits = any(share > 0 for kind, share in sizes[-1].budget.shares.items() if kind != "experts")
    useless = f"prune.compensate: {config.compensate} makes up for heads and channels, but here only experts leave; "
    require(
        refits or config.compensate in (None, "none"),
        useless + "set prune.head_ratio, or remove prune.compensate",
    )
    return (
        replace(config, compensate=config.compensate or ("least_squares" if refits else "none")),
        limits,
        sizes,
    )


def final_shape(limits: Limits, sizes: list[Size]) -> ModelShape | None:
    """Returns the shape that a run ends with. None if scores decide what each layer keeps."""
    bounds = sizes[-1].bounds
    return None if bounds is None else limits.with_equal(bounds[0], limits.dense)


def make_sizes(config: PruneConfig, limits: Limits) -> list[Size]:
    """Decides the sizes of a run, ordered by what they remove. Raises the errors of `resolve`.

    With `uniform` the counts of each lie between those of the size before and of the last, so no count grows.
    """
    last = _last_budget(config, limits)
    check_reachable(config, limits, last.ratio)
    bounds: Bounds | None = (
        (uniform_goal(limits, last), limits.bounds[1]) if limits.uniform else None
    )
    names, sizes, before = config.sizes, list[Size](), 0.0
    if names is None:
        return [Size(None, 0, last, bounds)]
    for place in sorted(range(len(names)), key=lambda i: _ratio_of(config, limits, names[i], last)):
        is_last = len(sizes) + 1 == len(names)
        budget = (
            last
            if is_last
            else Budget(_ratio_of(config, limits, names[place], last, bounds), last.shares)
        )
        own = bounds and (uniform_goal(limits, budget, bounds), bounds[1])
        removes = budget.ratio > before and (own is None or own[0] != own[1])
        least = (
            f"removes no more than {sizes[-1].name}" if sizes else "is too small to change a width"
        )
        require(removes, f"prune.sizes: {names[place]} {least}")
        sizes.append(Size(names[place], place, budget, own))
        before, bounds = budget.ratio, bounds and own and (bounds[0], own[0])
    return sizes


def _last_budget(config: PruneConfig, limits: Limits) -> Budget:
    """Returns the budget of a run's only size, or of the one that removes most."""
    asked = config.ratio or config.target
    if config.sizes is not None:
        largest = max(config.sizes, key=lambda size: _ratio_of(config, limits, size))
        asked = _fraction(largest) or largest
        for key, given in (("ratio", config.ratio), ("target", config.target)):
            other = f"prune.{key} {given} is not the largest cut of prune.sizes, which is {largest}; remove it"
            require(given in (None, asked), other)
    assert asked is not None, "the config has a ratio or a target"
    return make_budget(
        config, limits, _find_ratio(config, limits, asked) if isinstance(asked, str) else asked
    )


def _fraction(size: str) -> float | None:
    """Returns the fraction to remove. None if the size is a number of parameters or memory."""
    amount = read_amount(size, "prune.sizes")
    return amount.value if amount.unit == "parameters" and amount.value < 1 else None


def _ratio_of(
    config: PruneConfig,
    limits: Limits,
    size: str,
    last: Budget | None = None,
    bounds: Bounds | None = None,
) -> float:
    """Returns the ratio that one of `prune.sizes` removes. All have the shares of the last."""
    return _fraction(size) or _find_ratio(
        replace(config, head_ratio=None), limits, size, last, bounds
    )


def _find_ratio(
    config: PruneConfig,
    limits: Limits,
    asked: str,
    last: Budget | None = None,
    bounds: Bounds | None = None,
) -> float:
    """Finds the ratio that reaches a number of parameters or the memory of a server.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of the target.
    """
    key = "prune.sizes" if config.sizes else "prune.target"
    amount, numel = read_amount(asked, key), limits.dense.linear_numel()
    size = measure(config, limits.dense, amount)
    if size <= amount.value:
        raise UserError(f"{key} {asked} removes nothing from a model of {amount.format(size)}")

    def size_at(ratio: float) -> float:
        budget = Budget(ratio, last.shares) if last else make_budget(config, limits, ratio)
        if limits.uniform:
            return measure(
                config,
                limits.with_equal(uniform_goal(limits, budget, bounds), limits.dense),
                amount,
            )
        return _size_of_global(config, limits, budget, amount)

    least, most = (gone / numel for gone in reachable(config, limits))
    narrowest = size_at(most) if most > 0 else size
    if narrowest > amount.value:
        keeps = f"protected layers and minimum widths at least {amount.format(narrowest)} stay"
        raise UserError(f"{key} {asked} is out of reach: with the {keeps}")
    low, high = least, most
    while high - low > 0.5 / numel:  # `high` fits
        middle = (low + high) / 2
        low, high = (middle, high) if size_at(middle) > amount.value else (low, middle)
    if config.head_ratio and high - least < 1 / numel:
        raise UserError(
            f"prune.head_ratio {config.head_ratio} alone removes more than {key} {asked} asks for"
        )
    return high


def _size_of_global(config: PruneConfig, limits: Limits, budget: Budget, amount: Amount) -> float:
    """Returns the size after each kind has lost its share, from any layers."""
    dense = limits.dense
    size = dense_size = measure(config, dense, amount)
    for kind, share in budget.shares.items():
        # some layers lack this kind
        index = max(range(len(dense.layers)), key=lambda i: dense.counts[i][kind])
        layers = list(dense.counts)
        layers[index] = LayerCounts({**layers[index], kind: layers[index][kind] - 1})
        of_a_group = dense_size - measure(config, dense.resized(layers), amount)
        size -= of_a_group * limits.leaving(budget.ratio) * share / dense.group_numel[kind]
    return size


def server_memory(config: PruneConfig, shape: ModelShape) -> dict[str, float]:
    """Counts the bytes on a server, for the weights and for a KV cache of `prune.target_context` tokens.

    Delta nets have an fp32 state for each sequence instead. One state counts.
    """
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    cache = BYTES * cached_numel(shape) * config.target_context + 4 * state_numel(shape)
    return {"weights": weights, "kv_cache": cache}


def on_a_server(config: PruneConfig, shape: ModelShape, memory: float) -> dict[str, float]:
    """Returns the bytes of weights, and how many tokens of KV cache fit into the rest of `memory` bytes."""
    weights = server_memory(config, shape)["weights"]
    tokens = max(
        0, math.floor((memory - weights - 4 * state_numel(shape)) / (BYTES * cached_numel(shape)))
    )
    return {"parameters": shape.total_numel(), "weights": weights, "tokens": tokens}


def measure(config: PruneConfig, shape: ModelShape, amount: Amount) -> float:
    """Returns the size of a model in the unit of an amount."""
    return (
        sum(server_memory(config, shape).values())
        if amount.unit == "bytes"
        else shape.total_numel()
    )


def describe_target(
    config: PruneConfig, dense: ModelShape, pruned: ModelShape
) -> dict[str, Any] | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {"asked": config.target, "unit": amount.unit, "value": amount.value}
    entry |= {"dense": measure(config, dense, amount), "reached": measure(config, pruned, amount)}
    return entry | (server_memory(config, pruned) if amount.unit == "bytes" else {})
