"""The plan of a run's pruning: its limits, the steps of its cuts, and their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import counts_on_the_way
from loraprune_ds.pruning.target import Size, plan_sizes


@dataclass(frozen=True)
class Section:
    """The steps towards one size: warm-up, cuts, cool-down, recovery.

    The cubic schedule (Zhu & Gupta, arXiv 1710.01878) goes from the ratio before to the size's ratio r:
    before + (r − before) · (1 − (1 − t)³) between the warm-up and the cool-down.

    Steps count from 1. Step s is the s-th optimizer update, and a cut follows it.
    """

    size: Size
    before: float  # the ratio of the size before
    first: int  # the last step before the section
    start: int  # the last step of the warm-up
    end: int  # the last step that may cut. Its target is the ratio of the size
    recovery: int  # the last step before the recovery
    last: int  # the last step of the section
    every: int  # steps from one cut to the next
    passed_over: frozenset[int] = frozenset()  # steps without a cut, because no width would change

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        t = (step - self.start) / (self.end - self.start)
        return self.before + (self.size.ratio - self.before) * (1 - (1 - min(max(t, 0.0), 1.0)) ** 3)

    def counts(self, limits: Limits, step: int) -> LayerCounts | None:
        """Returns the counts that every open layer should have after `step`. None unless the ranking is `uniform`."""
        if self.size.bounds is None:
            return None
        removes, gone = self.size.ratio - self.before, max(0.0, self.target(step) - self.before)
        return counts_on_the_way(limits, self.size.bounds, gone / removes if removes > 0 else 1.0)

    def is_cut(self, step: int) -> bool:
        """Returns True if a cut follows this step."""
        due = (step - self.start) % self.every == 0 or step == self.end
        return self.start < step <= self.end and due and step not in self.passed_over

    @cached_property
    def cut_steps(self) -> list[int]:
        """Every `every`-th step after the warm-up and the last step before the cool-down, if a width changes."""
        return [step for step in range(self.start + 1, self.end + 1) if self.is_cut(step)]

    @property
    def last_cut(self) -> int:
        """The last step that cuts, which may be before `end`."""
        return max(self.cut_steps, default=self.end)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: a section for each size."""

    sections: list[Section]

    @property
    def ratio(self) -> float:
        """The fraction of the dense linear parameters that is gone in the end."""
        return self.sections[-1].size.ratio

    def section(self, step: int) -> Section:
        """Returns the section of a step. Steps after the last section belong to it."""
        return next((section for section in self.sections if step <= section.last), self.sections[-1])

    def target(self, step: int) -> float:
        """Returns the fraction of the dense linear parameters that should be gone after `step`."""
        return self.section(step).target(step)

    def cut_steps(self) -> list[int]:
        """Lists the steps that a cut follows."""
        return [step for section in self.sections for step in section.cut_steps]

    @property
    def last_cut(self) -> int:
        return self.sections[-1].last_cut

    def is_cut(self, step: int) -> bool:
        """Returns True if a cut follows this step."""
        return self.section(step).is_cut(step)

    def is_scored(self, step: int) -> bool:
        """Returns True for each step up to the last cut."""
        return step <= self.last_cut

    def precedes_cut(self, step: int, within: int) -> bool:
        """Returns True if a cut follows one of the next `within` steps, this one included."""
        return any(self.is_cut(s) for s in range(step, step + within))

    def ends(self) -> dict[int, str]:
        """Returns the last step of each of `prune.sizes`, with its name."""
        return {section.last: section.size.name for section in self.sections if section.size.name}

    def is_size(self, step: int) -> bool:
        """Returns True if a size ends at this step, and others follow."""
        return any(section.last == step for section in self.sections[:-1])

    def cycles(self) -> list[int]:
        """Lists the lengths of the learning rate's cycles: the cuts and the recovery of each section."""
        parts = [n for x in self.sections for n in (x.recovery - x.first, x.last - x.recovery)]
        return [steps for steps in parts if steps]


def make_section(
    config: PruneConfig, limits: Limits, size: Size, earlier: Section | None, steps: int, recovery: int
) -> Section:
    """Makes the section after the `earlier` one. Raises UserError if no step is left to cut or changes a width."""
    first, before = (earlier.last, earlier.size.ratio) if earlier else (0, 0.0)
    # The small term keeps 0.29 of 100 steps from being 28.999999999999996.
    start = first + math.floor(config.warmup_fraction * steps + 1e-6)
    end = first + steps - math.floor(config.cooldown_fraction * steps + 1e-6)
    to = f" for prune.sizes {size.name}" if size.name else ""
    few = f"train.steps {steps}{to} leaves no step between prune.warmup_fraction and prune.cooldown_fraction"
    require(end > start, few)
    last = first + steps
    section = Section(size, before, first, start, end, last, last + recovery, config.prune_every)
    section = replace(section, passed_over=_without_a_change(section, limits))
    if not section.cut_steps:
        multiple = f"prune.channel_multiple {config.channel_multiple}"
        raise UserError(f"prune.ratio {size.ratio:.6g}{to} is too small to change a width with {multiple}")
    return section


def _without_a_change(section: Section, limits: Limits) -> frozenset[int]:
    """Finds the steps whose cut would change no width of `uniform`.

    With multiples `global` waits until each open layer could lose one more on average. The last step always counts.
    """
    fine, is_uniform = limits.dense.kinds[-1], section.size.bounds is not None
    if not is_uniform and limits.multiples[fine] == 1:
        return frozenset()
    chunk = len(limits.open_layers) * limits.step_numel(fine) / limits.dense.linear_numel()
    unchanged, before = list[int](), None
    for step in (section.start, *section.cut_steps):
        now = section.counts(limits, step) or round(section.target(step) / chunk)
        if now == before:
            unchanged.append(step)
        before = now
    return frozenset(unchanged) - (frozenset() if is_uniform else {section.end})


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Returns the number of complete steps in some epochs, at least one."""
    return max(1, math.floor(epochs * samples / global_batch_size + 1e-9))  # 0.29 * 100 is 29, not 28.999...


@dataclass(frozen=True)
class PruningPlan:
    """Holds the decisions about pruning before the first step."""

    config: PruneConfig
    limits: Limits
    schedule: Schedule

    @property
    def steps(self) -> int:
        """The steps of the run, recoveries included."""
        return self.schedule.sections[-1].last


def plan_pruning(config: PruneConfig, limits: Limits, steps: int, recovery: Sequence[int] = ()) -> PruningPlan:
    """Plans the pruning of a run within its `make_limits`. Raises the errors of `make_section` and `plan_sizes`.

    Args:
        steps: the steps with cuts. Sizes share them in proportion to what they remove.
        recovery: the steps after the cuts of each size, in the order of `prune.sizes`.
    """
    sections, shared = list[Section](), 0
    for size in plan_sizes(config, limits):
        until = round(steps * size.ratio / limits.ratio)
        earlier, rest = sections[-1] if sections else None, recovery[size.place] if recovery else 0
        sections.append(make_section(config, limits, size, earlier, until - shared, rest))
        shared = until
    return PruningPlan(config, limits, Schedule(sections))
