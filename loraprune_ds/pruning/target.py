"""The sizes that a run makes, from `prune.ratio`, `prune.target` or `prune.sizes`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Amount, read_amount
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject
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

BudgetAt = Callable[[float], Budget]  # divides a ratio among the kinds
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
    needs_equal = dense.family.equal_layers
    if config.ranking is None:
        config = replace(config, ranking="uniform" if tower or needs_equal else "global")
    limits = make_limits(config, dense)
    sizes = make_sizes(config, limits)
    if needs_equal:
        final = final_shape(limits, sizes)
        require(
            final is not None and final.is_uniform,
            f"{dense.model_type} needs layers of one size: set {EQUAL_LAYERS}",
        )
    refits = any(share > 0 for kind, share in sizes[-1].budget.shares.items() if kind != "experts")
    if config.compensate is None:
        config = replace(config, compensate="least_squares" if refits else "none")
    return config, limits, sizes


def final_shape(limits: Limits, sizes: list[Size]) -> ModelShape | None:
    """Returns the shape that a run ends with. None if scores decide what each layer keeps."""
    bounds = sizes[-1].bounds
    return None if bounds is None else limits.with_equal(bounds[0])


def make_sizes(config: PruneConfig, limits: Limits) -> list[Size]:
    """Decides the sizes of a run, ordered by what they remove. Raises the errors of `resolve`.

    Under `uniform` the counts only fall from size to size.
    """
    if config.sizes is not None:
        return _several_sizes(config, limits, config.sizes)
    budget_at = partial(make_budget, config, limits)
    ratio = config.ratio
    if config.target is not None:
        ratio = _find_ratio(config, limits, config.target, budget_at)
    assert ratio is not None, "the config has a ratio or a target"
    budget = budget_at(ratio)
    check_reachable(config, limits, ratio)
    return [Size(None, 0, budget, _bounds_of(limits, budget))]


def _several_sizes(config: PruneConfig, limits: Limits, names: list[str]) -> list[Size]:
    """Decides the sizes of `prune.sizes`. All have the shares of the last, which removes most."""
    any_heads = replace(config, head_ratio=None)
    ratio_of = partial(_find_ratio, any_heads, limits)
    budget_at = partial(make_budget, any_heads, limits)
    largest = max(names, key=lambda name: ratio_of(name, budget_at))
    _check_largest(config, largest)
    budget_at = partial(make_budget, config, limits)
    last = budget_at(_find_ratio(config, limits, largest, budget_at))
    check_reachable(config, limits, last.ratio)
    with_shares = partial(Budget, shares=last.shares)
    ratios = [ratio_of(name, with_shares) for name in names]
    bounds = _bounds_of(limits, last)
    sizes = list[Size]()
    for place in sorted(range(len(names)), key=ratios.__getitem__):
        budget = last
        if len(sizes) + 1 < len(names):
            budget = with_shares(ratio_of(names[place], with_shares, bounds))
        size = Size(names[place], place, budget, _bounds_of(limits, budget, bounds))
        _check_removes(size, sizes[-1] if sizes else None)
        sizes.append(size)
        if bounds and size.bounds:
            bounds = bounds[0], size.bounds[0]
    return sizes


def _bounds_of(limits: Limits, budget: Budget, bounds: Bounds | None = None) -> Bounds | None:
    """Returns the bounds of a size, within those of all later sizes. None unless the ranking is `uniform`."""
    if not limits.uniform:
        return None
    _, start = bounds or limits.bounds
    return uniform_goal(limits, budget, bounds), start


def _check_removes(size: Size, before: Size | None) -> None:
    """Raises UserError if a size removes nothing from the size before, or from the dense model."""
    removes = before is None or size.budget.ratio > before.budget.ratio
    if size.bounds is not None:
        goal, start = size.bounds
        removes &= goal != start
    reason = "is too small to change a width; lower prune.channel_multiple"
    if before is not None:
        reason = f"removes no more than {before.name}; remove one of them"
    require(removes, f"prune.sizes: {size.name} {reason}")


def _check_largest(config: PruneConfig, largest: str) -> None:
    """Raises UserError if `prune.ratio` or `prune.target` is not the size that removes most."""
    for key, value in (("ratio", config.ratio), ("target", config.target)):
        require(
            value in (None, _fraction(largest) or largest),
            f"prune.{key} {value} is not the largest cut of prune.sizes, which is {largest}; remove it",
        )


def _fraction(size: str) -> float | None:
    """Returns the fraction to remove. None if the size is a number of parameters or memory."""
    amount = read_amount(size, "prune.sizes")
    return amount.value if amount.unit == "parameters" and amount.value < 1 else None


def _find_ratio(
    config: PruneConfig,
    limits: Limits,
    asked: str,
    budget_at: BudgetAt,
    bounds: Bounds | None = None,
) -> float:
    """Finds the ratio that reaches a number of parameters or the memory of a server. A size may also be the ratio.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of the target.
    """
    key = "prune.target"
    if config.sizes:
        key = "prune.sizes"
        fraction = _fraction(asked)
        if fraction is not None:
            return fraction
    amount = read_amount(asked, key)
    dense_size = measure(config, limits.dense, amount)
    if dense_size <= amount.value:
        raise UserError(
            f"{key} {asked} removes nothing from a model of {amount.format(dense_size)}"
        )

    def size_at(ratio: float) -> float:
        budget = budget_at(ratio)
        if not limits.uniform:
            return _size_of_global(config, limits, budget, amount)
        goal = uniform_goal(limits, budget, bounds)
        return measure(config, limits.with_equal(goal), amount)

    numel = limits.dense.linear_numel()
    least, most = (leaving / numel for leaving in reachable(config, limits))
    smallest = size_at(most) if most > 0 else dense_size
    if smallest > amount.value:
        raise UserError(
            f"{key} {asked} is out of reach: with the protected layers and minimum widths "
            f"at least {amount.format(smallest)} stay"
        )
    low, high = least, most
    while high - low > 0.5 / numel:  # `high` fits
        middle = (low + high) / 2
        if size_at(middle) > amount.value:
            low = middle
        else:
            high = middle
    if config.head_ratio and high - least < 1 / numel:
        raise UserError(
            f"prune.head_ratio {config.head_ratio} alone removes more than {key} {asked} asks for; lower it"
        )
    return high


def _size_of_global(config: PruneConfig, limits: Limits, budget: Budget, amount: Amount) -> float:
    """Returns the size after each kind has lost its share, from any layers."""
    dense = limits.dense
    leaving = limits.leaving(budget.ratio)
    size = dense_size = measure(config, dense, amount)
    for kind, share in budget.shares.items():
        layers = list(dense.counts)
        # Some layers lack this kind.
        widest = max(layers, key=itemgetter(kind))
        layers[layers.index(widest)] = LayerCounts({**widest, kind: widest[kind] - 1})
        group_size = dense_size - measure(config, dense.resized(layers), amount)
        size -= group_size * leaving * share / dense.group_numel[kind]
    return size


def server_memory(config: PruneConfig, shape: ModelShape) -> dict[str, float]:
    """Counts the bytes on a server, for the weights and for a KV cache of `prune.target_context` tokens.

    Delta nets have an fp32 state for each sequence instead. One state counts.
    """
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    cache = BYTES * cached_numel(shape) * config.target_context + 4 * state_numel(shape)
    return {"weights": weights, "kv_cache": cache}


def measure(config: PruneConfig, shape: ModelShape, amount: Amount) -> float:
    """Returns the size of a model in the unit of an amount."""
    if amount.unit == "bytes":
        return sum(server_memory(config, shape).values())
    return shape.total_numel()


def describe_target(
    config: PruneConfig, dense: ModelShape, pruned: ModelShape
) -> JsonObject | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {
        "asked": config.target,
        "unit": amount.unit,
        "value": amount.value,
        "dense": measure(config, dense, amount),
        "reached": measure(config, pruned, amount),
    }
    if amount.unit == "bytes":
        entry |= server_memory(config, pruned)
    return entry
