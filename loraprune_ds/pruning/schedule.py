"""The schedule of a run's pruning: the steps of its cuts, and how far each of them goes."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from loraprune_ds.errors import require
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.pruning.goal import Goal
from loraprune_ds.pruning.limits import Limits


@dataclass(frozen=True)
class Schedule:
    """Holds the steps of a run: warm-up, cuts, cool-down, recovery.

    The cubic schedule (Zhu & Gupta, arXiv 1710.01878) goes 1 − (1 − t)³ of the way to the goal between the warm-up and
    the cool-down.

    Steps count from 1. Step s is the s-th optimizer update, and a cut follows it.
    """

    goal: Goal
    start: int  # the last step of the warm-up
    end: int  # the last step that may cut. It reaches the goal
    recovery: int  # the last step before the recovery
    steps: int  # of the run, recovery included

    @property
    def limits(self) -> Limits:
        return self.goal.limits

    def fraction(self, step: int) -> float:
        """Returns the fraction of the way to the goal that should be made after `step`."""
        t = (step - self.start) / (self.end - self.start)
        return 1 - (1 - min(max(t, 0.0), 1.0)) ** 3

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        return self.goal.ratio * self.fraction(step)

    @cached_property
    def cut_steps(self) -> list[int]:
        """The steps that a cut follows: every `prune_every`-th after the warm-up, and `end`, if a width changes.

        Under `global` a step is kept once every open layer could lose one multiple on average. `end` is always kept.
        """
        every = self.goal.config.prune_every
        steps = [*range(self.start + every, self.end, every), self.end]
        fine = self.limits.dense.kinds[-1]
        if not self.limits.uniform and self.limits.multiples[fine] == 1:
            return steps
        widths = pairwise(map(self._width, [self.start, *steps]))
        changed = [
            step for step, (before, after) in zip(steps, widths, strict=True) if before != after
        ]
        if not self.limits.uniform and self.end not in changed:
            changed.append(self.end)
        return changed

    def _width(self, step: int) -> LayerCounts | int:
        """Returns the equal counts after `step`. For `global`, the multiples that each open layer loses on average."""
        limits = self.limits
        if limits.uniform:
            return self.goal.counts_at(self.fraction(step))
        one_each = len(limits.open_layers) * limits.step_numel(limits.dense.kinds[-1])
        return round(self.fraction(step) * self.goal.numel / one_each)

    @property
    def last_cut(self) -> int:
        return self.cut_steps[-1]

    def is_cut(self, step: int) -> bool:
        """Returns True if a cut follows this step."""
        return step in self.cut_steps

    def is_scored(self, step: int) -> bool:
        """Returns True for each step up to the last cut."""
        return step <= self.last_cut

    @property
    def final_numel(self) -> int:
        """The parameters after the last cut."""
        return round(self.limits.dense.total_numel() - self.goal.numel)

    def cycles(self) -> list[int]:
        """Lists the lengths of the learning rate's cycles: the steps with cuts, and the recovery."""
        return [steps for steps in (self.recovery, self.steps - self.recovery) if steps > 0]


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Returns the number of complete steps in some epochs, at least one."""
    # 0.29 * 100 is 29, not 28.999...
    return max(1, math.floor(epochs * samples / global_batch_size + 1e-9))


def make_schedule(goal: Goal, steps: int, recovery: int = 0) -> Schedule:
    """Decides the steps of the cuts.

    Args:
        steps: the steps with cuts.
        recovery: the steps after these.

    Raises:
        UserError: no step is left to cut, or none changes a width.
    """
    config = goal.config
    # The small term keeps 0.29 of 100 steps from being 28.999999999999996.
    start = math.floor(config.warmup_fraction * steps + 1e-6)
    end = steps - math.floor(config.cooldown_fraction * steps + 1e-6)
    schedule = Schedule(goal, start, end, steps, steps + recovery)
    key = f"prune.ratio {goal.ratio:.6g}"
    if config.target is not None:
        key = f"prune.target {config.target}"
    require(
        end > start,
        f"{key}: {steps} train.steps leave no step between "
        "prune.warmup_fraction and prune.cooldown_fraction; raise train.steps",
    )
    require(
        schedule.cut_steps,
        f"{key} is too small to change a width with prune.channel_multiple {config.channel_multiple}; "
        "lower prune.channel_multiple",
    )
    return schedule
