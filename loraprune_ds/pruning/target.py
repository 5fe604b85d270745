"""What a run removes in the end, from `prune.ratio` or `prune.target`."""

from dataclasses import dataclass, replace
from operator import itemgetter

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Amount
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.groups import EQUAL_LAYERS, LayerCounts
from loraprune_ds.model.shape import ModelShape, cached_numel, state_numel
from loraprune_ds.pruning.limits import (
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
class Goal:
    """Holds what a run removes in the end."""

    budget: Budget
    counts: LayerCounts | None = None  # `uniform`: those of every open layer


def resolve(
    config: PruneConfig, dense: ModelShape, *, tower: bool = False
) -> tuple[PruneConfig, Limits, Goal]:
    """Fills in `prune.ranking` and `prune.compensate`, and decides the limits and the goal of a run.

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
    goal = make_goal(config, limits)
    if needs_equal:
        final = final_shape(limits, goal)
        require(
            final is not None and final.is_uniform,
            f"{dense.model_type} needs layers of one size: set {EQUAL_LAYERS}",
        )
    refits = any(share > 0 for kind, share in goal.budget.shares.items() if kind != "experts")
    if config.compensate is None:
        config = replace(config, compensate="least_squares" if refits else "none")
    return config, limits, goal


def final_shape(limits: Limits, goal: Goal) -> ModelShape | None:
    """Returns the shape that a run ends with. None if scores decide what each layer keeps."""
    return None if goal.counts is None else limits.with_equal(goal.counts)


def make_goal(config: PruneConfig, limits: Limits) -> Goal:
    """Decides what a run removes. Raises the errors of `resolve`."""
    ratio = config.ratio
    if ratio is None:
        ratio = _find_ratio(config, limits)
    budget = make_budget(config, limits, ratio)
    check_reachable(config, limits, ratio)
    return Goal(budget, uniform_goal(limits, budget) if limits.uniform else None)


def _find_ratio(config: PruneConfig, limits: Limits) -> float:
    """Finds the ratio that reaches `prune.target`.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of the target.
    """
    amount = config.target_amount
    assert amount is not None, "the config has a ratio or a target"
    asked = f"prune.target {config.target}"
    dense_size = measure(config, limits.dense, amount)
    if dense_size <= amount.value:
        raise UserError(f"{asked} removes nothing from a model of {amount.format(dense_size)}")

    def size_at(ratio: float) -> float:
        budget = make_budget(config, limits, ratio)
        if not limits.uniform:
            return _size_of_global(config, limits, budget, amount)
        return measure(config, limits.with_equal(uniform_goal(limits, budget)), amount)

    numel = limits.dense.linear_numel()
    least, most = (leaving / numel for leaving in reachable(config, limits))
    smallest = size_at(most) if most > 0 else dense_size
    if smallest > amount.value:
        raise UserError(
            f"{asked} is out of reach: with the protected layers and minimum widths "
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
            f"prune.head_ratio {config.head_ratio} alone removes more than {asked} asks for; lower it"
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
