"""The schedule: the steps that cut, and how much should be gone by then."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.flops import cached_numel
from loraprune_ds.model.shapes import LayerShape, ModelShape
from loraprune_ds.pruning.limits import Limits, limits_without_ratio, reachable, with_ratio
from loraprune_ds.pruning.ranking import counts_on_the_way, uniform_goal


@dataclass(frozen=True)
class Schedule:
    """The cubic schedule (Zhu & Gupta, arXiv 1710.01878): ratio · (1 − (1 − t)³) between warm-up and cool-down.

    Steps count from 1. Step s is the s-th optimizer update, and a cut follows it.
    """

    ratio: float
    start: int  # the last step of the warm-up
    end: int  # the last step that may cut, where the target is `ratio`
    every: int  # steps from one cut to the next
    score_every: int = 1
    passed_over: frozenset[int] = frozenset()  # steps that cut nothing because no width would change

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        t = (step - self.start) / (self.end - self.start)
        return self.ratio * (1 - (1 - min(max(t, 0.0), 1.0)) ** 3)

    def cut_steps(self) -> list[int]:
        """Lists every `every`-th step after the warm-up and the last step before the cool-down, if a width changes."""
        return [step for step in range(self.start + 1, self.end + 1) if self.is_cut(step)]

    @cached_property
    def last_cut(self) -> int:
        """The last step that cuts, which may be before `end`."""
        return max(self.cut_steps(), default=self.end)

    def is_cut(self, step: int) -> bool:
        """Returns True if a cut follows this step."""
        due = (step - self.start) % self.every == 0 or step == self.end
        return self.start < step <= self.end and due and step not in self.passed_over

    def is_scored(self, step: int) -> bool:
        """Returns True for each `score_every`-th step and for steps that cut, up to the last cut."""
        return step <= self.last_cut and ((step - 1) % self.score_every == 0 or self.is_cut(step))

    def precedes_cut(self, step: int, within: int) -> bool:
        """Returns True if a cut follows one of the next `within` steps, this one included."""
        return any(self.is_cut(s) for s in range(step, step + within))


def make_schedule(config: PruneConfig, steps: int, limits: Limits) -> Schedule:
    """Makes the schedule of a run of `steps` steps. Raises UserError if no step is left to cut or changes a width."""
    # The sliver keeps 0.29 of 100 steps from being 28.999999999999996.
    start = math.floor(config.warmup_fraction * steps + 1e-6)
    end = steps - math.floor(config.cooldown_fraction * steps + 1e-6)
    if end <= start:
        raise UserError(f"train.steps {steps} leaves no step between prune.warmup_fraction and prune.cooldown_fraction")
    schedule = Schedule(limits.ratio, start, end, config.prune_every, config.score_every)
    schedule = replace(schedule, passed_over=_without_a_change(schedule, config, limits))
    if not schedule.cut_steps():
        multiple = f"prune.channel_multiple {config.channel_multiple}"
        raise UserError(f"prune.ratio {limits.ratio:.6g} is too small to change a width with {multiple}")
    return schedule


def _without_a_change(schedule: Schedule, config: PruneConfig, limits: Limits) -> frozenset[int]:
    """Finds the steps whose cut would change no width of `uniform`.

    With multiples `global` waits until each open layer could lose one more on average, and keeps the last step.
    """
    fine = limits.dense.kinds[-1]
    if config.ranking == "global" and limits.multiples[fine] == 1:
        return frozenset()
    goal = uniform_goal(limits, schedule.ratio) if config.ranking == "uniform" else None
    block = len(limits.open_layers) * limits.step_numel(fine) / limits.dense.linear_numel()
    unchanged, before = list[int](), None
    for step in (0, *schedule.cut_steps()):
        target = schedule.target(step)
        now = round(target / block) if goal is None else counts_on_the_way(limits, goal, target / schedule.ratio)
        if now == before:
            unchanged.append(step)
        before = now
    return frozenset(unchanged) - (frozenset() if goal else {schedule.end})


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Returns the whole steps in some epochs, at least one."""
    return max(1, math.floor(epochs * samples / global_batch_size + 1e-9))  # 0.29 * 100 is 29, not 28.999...


BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


@dataclass(frozen=True)
class ServerMemory:
    """Holds the bytes on a server."""

    weights: float
    kv_cache: float

    @property
    def total(self) -> float:
        return self.weights + self.kv_cache


def server_memory(config: PruneConfig, shape: ModelShape) -> ServerMemory:
    """Counts the bytes of weights, and of a KV cache of `prune.target_context` tokens."""
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    return ServerMemory(weights, BYTES * cached_numel(shape) * config.target_context)


def on_a_server(config: PruneConfig, shape: ModelShape, memory: float) -> dict[str, float]:
    """Returns the bytes of weights, and the tokens of KV cache that fit into the rest of `memory` bytes."""
    weights = server_memory(config, shape).weights
    tokens = max(0, math.floor((memory - weights) / (BYTES * cached_numel(shape))))
    return {"parameters": shape.total_numel(), "weights": weights, "tokens": tokens}


def measure(config: PruneConfig, shape: ModelShape) -> float:
    """Returns the size of a model in the unit of `prune.target`."""
    in_bytes = config.target_amount is not None and config.target_amount.unit == "bytes"
    return server_memory(config, shape).total if in_bytes else shape.total_numel()


def find_ratio(config: PruneConfig, dense: ModelShape) -> float | None:
    """Finds the ratio that reaches `prune.target`, or returns `prune.ratio` where there is no target.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of it.
    """
    amount = config.target_amount
    if amount is None:
        return config.ratio
    size, numel = measure(config, dense), dense.linear_numel()
    if size <= amount.value:
        has = amount.format(size)
        raise UserError(f"prune.target {config.target} takes nothing from the dense model, which has {has}")
    limits = limits_without_ratio(config, dense)
    least, most = (gone / numel for gone in reachable(config, limits))
    size_at = _size_of_uniform if config.ranking == "uniform" else _size_of_global
    narrowest = size_at(config, with_ratio(config, limits, most)) if most > 0 else size
    if narrowest > amount.value:
        keeps = f"protected layers, minimum widths and prune.max_layer_ratio at least {amount.format(narrowest)} stay"
        raise UserError(f"prune.target {config.target} is out of reach: with the {keeps}")
    low, high = least, most
    while high - low > 0.5 / numel:  # `high` fits
        middle = (low + high) / 2
        too_large = size_at(config, with_ratio(config, limits, middle)) > amount.value
        low, high = (middle, high) if too_large else (low, middle)
    if config.head_ratio and high - least < 1 / numel:
        raise UserError(f"prune.head_ratio {config.head_ratio} alone takes more than prune.target {config.target} asks")
    return high


def describe_target(config: PruneConfig, dense: ModelShape, pruned: ModelShape) -> dict[str, Any] | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {"asked": config.target, "unit": amount.unit, "value": amount.value}
    entry |= {"dense": measure(config, dense), "reached": measure(config, pruned)}
    if amount.unit == "bytes":
        memory = server_memory(config, pruned)
        entry |= {"weights": memory.weights, "kv_cache": memory.kv_cache}
    return entry


def _size_of_uniform(config: PruneConfig, limits: Limits) -> float:
    """Returns the size at the final widths of `uniform`."""
    goal, open_layers = uniform_goal(limits, limits.ratio), set(limits.open_layers)
    layers = tuple(goal if i in open_layers else layer for i, layer in enumerate(limits.dense.layers))
    return measure(config, limits.dense.with_layers(layers))


def _size_of_global(config: PruneConfig, limits: Limits) -> float:
    """Returns the size once each kind has lost its share, from whichever layers."""
    dense, leaving = limits.dense, limits.ratio * limits.dense.linear_numel()
    size = whole = measure(config, dense)
    for kind, share in limits.shares.items():
        *others, layer = sorted(dense.layers, key=lambda layer: layer[kind])  # some have no experts
        without_one = LayerShape({**layer, kind: layer[kind] - 1})
        of_a_group = whole - measure(config, dense.with_layers((*others, without_one)))
        size -= of_a_group * leaving * share / dense.group_numel(kind)
    return size
