"""Budgets in place of a ratio: what must go so that the model has so many parameters, or fits a server.

A server holds the weights and the KV cache of all its sequences. Sliding windows count as full attention.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.flops import cached_numel
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.limits import Limits, limits_without_ratio, reachable, with_ratio
from loraprune_ds.pruning.ranking import uniform_goal

BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


@dataclass(frozen=True)
class ServerMemory:
    """Counts the bytes that a server holds: weights, and the KV cache of so many tokens of all its sequences."""

    weights: float
    per_token: float
    tokens: int

    @property
    def kv_cache(self) -> float:
        return self.per_token * self.tokens

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache


def server_memory(config: PruneConfig, shape: ModelShape) -> ServerMemory:
    """Adds up weights and KV cache of a model under `prune.target_*`."""
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    return ServerMemory(weights, BYTES * cached_numel(shape), config.target_context)


def on_a_server(config: PruneConfig, shape: ModelShape, memory: float) -> dict[str, float]:
    """Returns the bytes of weights, and the tokens of KV cache for which `memory` has room beside them."""
    needed = server_memory(config, shape)
    tokens = max(0, math.floor((memory - needed.weights) / needed.per_token))
    return {"parameters": shape.total_numel(), "weights": needed.weights, "tokens": tokens}


def measure(config: PruneConfig, shape: ModelShape) -> float:
    """Returns the size of a model in the unit of `prune.target`."""
    in_bytes = config.target_amount is not None and config.target_amount.unit == "bytes"
    return server_memory(config, shape).total if in_bytes else shape.total_numel()


def find_ratio(config: PruneConfig, dense: ModelShape) -> float | None:
    """Finds the ratio that reaches `prune.target`. Without a target it is `prune.ratio`.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of it.

    Raises:
        UserError: nothing would have to go, or the limits keep more. The line says how much.
    """
    amount = config.target_amount
    if amount is None:
        return config.ratio
    whole, numel = measure(config, dense), dense.linear_numel()
    if whole <= amount.value:
        has = amount.format(whole)
        raise UserError(f"prune.target {config.target} takes nothing from the dense model, which has {has}")
    limits = limits_without_ratio(config, dense)
    least, most = (gone / numel for gone in reachable(config, limits))
    size = _size_of_uniform if config.ranking == "uniform" else _size_of_global

    def size_at(ratio: float) -> float:
        return size(config, with_ratio(config, limits, ratio))

    narrowest = size_at(most) if most > 0 else whole
    if narrowest > amount.value:
        raise UserError(
            f"prune.target {config.target} is out of reach: with the protected layers, minimum widths and "
            f"prune.max_layer_ratio at least {amount.format(narrowest)} stay"
        )
    ratio = _least_that_fits(size_at, amount.value, least, most, 1 / numel)
    if config.head_ratio and ratio - least < 1 / numel:
        raise UserError(f"prune.head_ratio {config.head_ratio} alone takes more than prune.target {config.target} asks")
    return ratio


def describe_target(config: PruneConfig, dense: ModelShape, pruned: ModelShape) -> dict[str, Any] | None:
    """Makes the report's entry about the target. None if the run had a ratio."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {"asked": config.target, "unit": amount.unit, "value": amount.value}
    entry |= {"dense": measure(config, dense), "reached": measure(config, pruned)}
    if amount.unit == "bytes":
        memory = server_memory(config, pruned)
        entry |= {"weights": memory.weights, "kv_cache": memory.kv_cache}
    return entry


def _least_that_fits(size_at: Callable[[float], float], target: float, low: float, high: float, step: float) -> float:
    """Finds by halving where sizes fall to the target. `high` fits."""
    while high - low > step / 2:
        middle = (low + high) / 2
        if size_at(middle) > target:
            low = middle
        else:
            high = middle
    return high


def _size_of_uniform(config: PruneConfig, limits: Limits) -> float:
    """Returns the size at the widths that `uniform` will end with."""
    goal, open_layers = uniform_goal(limits, limits.ratio), set(limits.open_layers)
    layers = tuple(goal if i in open_layers else layer for i, layer in enumerate(limits.dense.layers))
    return measure(config, limits.dense.with_layers(layers))


def _size_of_global(config: PruneConfig, limits: Limits) -> float:
    """Returns the size once each kind gave its share. Which layers gave it makes no difference."""
    dense, leaving = limits.dense, limits.ratio * limits.dense.linear_numel()
    size = whole = measure(config, dense)
    for kind, share in limits.shares.items():
        *others, layer = sorted(dense.layers, key=lambda layer: layer[kind])  # some have no experts
        without_one = LayerShape({**layer, kind: layer[kind] - 1})
        of_a_group = whole - measure(config, dense.with_layers((*others, without_one)))
        size -= of_a_group * leaving * share / dense.group_numel(kind)
    return size
