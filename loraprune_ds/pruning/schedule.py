"""The plan of a run's pruning: within which limits, at which steps, and how much should be gone by then."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.pruning.limits import Limits
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
        """Returns True for each step up to the last cut."""
        return step <= self.last_cut

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
    schedule = Schedule(limits.ratio, start, end, config.prune_every)
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
    if config.ranking != "uniform" and limits.multiples[fine] == 1:
        return frozenset()
    goal = uniform_goal(limits, schedule.ratio) if config.ranking == "uniform" else None
    chunk = len(limits.open_layers) * limits.step_numel(fine) / limits.dense.linear_numel()
    unchanged, before = list[int](), None
    for step in (0, *schedule.cut_steps()):
        target = schedule.target(step)
        now = round(target / chunk) if goal is None else counts_on_the_way(limits, goal, target / schedule.ratio)
        if now == before:
            unchanged.append(step)
        before = now
    return frozenset(unchanged) - (frozenset() if goal else {schedule.end})


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Returns the whole steps in some epochs, at least one."""
    return max(1, math.floor(epochs * samples / global_batch_size + 1e-9))  # 0.29 * 100 is 29, not 28.999...


@dataclass(frozen=True)
class PruningPlan:
    """Holds what is fixed about pruning before the first step."""

    config: PruneConfig
    limits: Limits
    schedule: Schedule


def plan_pruning(config: PruneConfig, limits: Limits, steps: int) -> PruningPlan:
    """Plans the pruning of a run of `steps` steps, within its `make_limits`. Raises UserError as `make_schedule`."""
    return PruningPlan(config, limits, make_schedule(config, steps, limits))
