"""The schedule of a run's pruning: its limits, the steps of its cuts, and their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import require
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.pruning.limits import Budget, Limits
from loraprune_ds.pruning.ranking import counts_on_the_way
from loraprune_ds.pruning.target import Size


@dataclass(frozen=True)
class Section:
    """The steps towards one size: warm-up, cuts, cool-down, recovery.

    The cubic schedule (Zhu & Gupta, arXiv 1710.01878) goes from the ratio before to the size's ratio r:
    before + (r − before) · (1 − (1 − t)³) between the warm-up and the cool-down.

    Steps count from 1. Step s is the s-th optimizer update, and a cut follows it.
    """

    limits: Limits
    size: Size
    before: float  # the ratio of the size before
    first: int  # the last step before the section
    start: int  # the last step of the warm-up
    end: int  # the last step that may cut. Its target is the ratio of the size
    recovery: int  # the last step before the recovery
    last: int  # the last step of the section
    every: int  # steps from one cut to the next

    @property
    def ratio(self) -> float:
        """The fraction of the dense linear parameters that is gone at its end."""
        return self.size.budget.ratio

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        t = (step - self.start) / (self.end - self.start)
        return self.before + (self.ratio - self.before) * (1 - (1 - min(max(t, 0.0), 1.0)) ** 3)

    def budget(self, step: int) -> Budget:
        """Returns what should be gone after `step`."""
        return Budget(self.target(step), self.size.budget.shares)

    def counts(self, step: int) -> LayerCounts | None:
        """Returns the counts that every open layer should have after `step`. None unless the ranking is `uniform`."""
        if self.size.bounds is None:
            return None
        part = (self.target(step) - self.before) / (self.ratio - self.before)
        return counts_on_the_way(self.limits, self.size.bounds, part)

    @cached_property
    def cut_steps(self) -> list[int]:
        """Every `every`-th step after the warm-up and the last step before the cool-down, if a width changes.

        Under `global` a step is kept once every open layer could lose one multiple on average. The last is always kept.
        """
        steps = [*range(self.start + self.every, self.end, self.every), self.end]
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
        counts = self.counts(step)
        if counts is not None:
            return counts
        limits = self.limits
        one_each = len(limits.open_layers) * limits.step_numel(limits.dense.kinds[-1])
        return round(self.target(step) / (one_each / limits.dense.linear_numel()))


@dataclass(frozen=True)
class Schedule:
    """Holds the decisions about pruning before the first step, with a section of steps for each size."""

    config: PruneConfig
    limits: Limits
    sections: list[Section]

    @property
    def steps(self) -> int:
        """The steps of the run, recoveries included."""
        return self.sections[-1].last

    @property
    def ratio(self) -> float:
        """The fraction of the dense linear parameters that is gone in the end."""
        return self.sections[-1].ratio

    def section(self, step: int) -> Section:
        """Returns the section of a step. Steps after the last section belong to it."""
        for section in self.sections:
            if step <= section.last:
                return section
        return self.sections[-1]

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        return self.section(step).target(step)

    @cached_property
    def cut_steps(self) -> list[int]:
        """The steps that a cut follows."""
        return [step for section in self.sections for step in section.cut_steps]

    @property
    def last_cut(self) -> int:
        return self.cut_steps[-1]

    def is_cut(self, step: int) -> bool:
        """Returns True if a cut follows this step."""
        return step in self.cut_steps

    def is_scored(self, step: int) -> bool:
        """Returns True for each step up to the last cut."""
        return step <= self.last_cut

    def ends(self) -> dict[int, str]:
        """Returns the last step of each of `prune.sizes`, with its name."""
        return {section.last: section.size.name for section in self.sections if section.size.name}

    def numel_after(self, step: int) -> float:
        """Counts the parameters of all models whose sections end after `step`."""
        limits = self.limits
        return sum(
            limits.dense.total_numel() - limits.leaving(section.ratio)
            for section in self.sections
            if section.last > step
        )

    def cycles(self) -> list[int]:
        """Lists the lengths of the learning rate's cycles: the cuts and the recovery of each section."""
        borders = [0]
        for section in self.sections:
            borders += [section.recovery, section.last]
        return [end - start for start, end in pairwise(borders) if end > start]


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Returns the number of complete steps in some epochs, at least one."""
    # 0.29 * 100 is 29, not 28.999...
    return max(1, math.floor(epochs * samples / global_batch_size + 1e-9))


def plan_pruning(
    config: PruneConfig,
    limits: Limits,
    sizes: Sequence[Size],
    steps: int,
    recovery: Sequence[int] = (),
) -> Schedule:
    """Plans the pruning of a run, with the values of `resolve`.

    Args:
        steps: the steps with cuts. Sizes share them in proportion to what they remove.
        recovery: the steps after the cuts of each size, in the order of `prune.sizes`.

    Raises:
        UserError: a size has no step left to cut, or none that changes a width.
    """
    sections = list[Section]()
    shared = 0  # the steps with cuts that earlier sizes take
    before = 0.0
    first = 0
    for size in sizes:
        until = round(steps * size.budget.ratio / sizes[-1].budget.ratio)
        count = until - shared
        # The small term keeps 0.29 of 100 steps from being 28.999999999999996.
        start = first + math.floor(config.warmup_fraction * count + 1e-6)
        end = first + count - math.floor(config.cooldown_fraction * count + 1e-6)
        recovery_start = first + count
        last = recovery_start + (recovery[size.place] if recovery else 0)
        section = Section(
            limits, size, before, first, start, end, recovery_start, last, config.prune_every
        )
        _check_cuts(config, section, steps)
        sections.append(section)
        shared = until
        before = section.ratio
        first = last
    return Schedule(config, limits, sections)


def _check_cuts(config: PruneConfig, section: Section, steps: int) -> None:
    """Raises UserError if a section has no step left to cut, or none that changes a width."""
    key = f"prune.ratio {section.ratio:.6g}"
    if section.size.name is not None:
        key = f"prune.sizes {section.size.name}"
    elif config.target is not None:
        key = f"prune.target {config.target}"
    require(
        section.end > section.start,
        f"{key} gets {section.recovery - section.first} of {steps} train.steps, which leaves no step between "
        "prune.warmup_fraction and prune.cooldown_fraction; raise train.steps",
    )
    require(
        section.cut_steps,
        f"{key} is too small to change a width with prune.channel_multiple {config.channel_multiple}; "
        "lower prune.channel_multiple",
    )
