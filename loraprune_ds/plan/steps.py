"""What each step of a run does besides training."""

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
    """What `Pruner.score` and `Compensator.record_step` do at a step, from 1."""
    measures = prune.compensate != "none" and schedule.precedes_cut(step, prune.compensate_steps)
    return StepKind(schedule.is_scored(step), measures)
