"""The steps of a run: how many there are, as the run itself counts them, and what each does besides training."""

import math
from dataclasses import dataclass

from loraprune_ds.config import PruneConfig
from loraprune_ds.pruning.schedule import Schedule


@dataclass(frozen=True)
class StepKind:
    """Whether a step scores, and whether it measures the inputs of o_proj and down_proj (`prune.compensate`)."""

    scores: bool
    measures: bool


HEAVIEST = StepKind(scores=True, measures=True)  # that of every cut
PLAIN = StepKind(scores=False, measures=False)  # after the last cut


def step_kind(prune: PruneConfig, schedule: Schedule, step: int) -> StepKind:
    """What `Pruner.observe` and `Compensator.begin` do at a step, from 1."""
    every = prune.gradient_every if prune.criterion == "gradient" else 1
    near = range(step, step + prune.compensate_steps)
    measures = prune.compensate != "none" and any(schedule.is_cut(s) for s in near)
    return StepKind(schedule.is_scored(step, every), measures)


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Whole steps in so many epochs, at least one."""
    steps = epochs * samples / global_batch_size
    return max(1, math.floor(steps + 1e-9))  # 0.29 epochs of 100 samples are 29, not 28.999...
