"""Seconds and bytes of a whole run, every step as the schedule has it."""

from dataclasses import dataclass

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.seconds import Seconds, step_seconds
from loraprune_ds.plan.steps import StepKind, step_kind
from loraprune_ds.plan.traffic import StepTraffic, step_traffic


@dataclass(frozen=True)
class Total:
    """Seconds if all that can overlaps, and if nothing does; bytes that a rank sends."""

    hidden: float
    exposed: float
    sent: float

    def __add__(self, other: "Total") -> "Total":
        return Total(self.hidden + other.hidden, self.exposed + other.exposed, self.sent + other.sent)

    def __mul__(self, factor: float) -> "Total":
        return Total(self.hidden * factor, self.exposed * factor, self.sent * factor)


NOTHING = Total(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class End:
    """One end of the run: the model before its first cut, or after its last, and what a micro-batch gathers there."""

    shape: ModelShape
    training: PassTraffic


def step_cost(request: Request, end: End, kind: StepKind) -> tuple[StepTraffic, Seconds]:
    """Of one step."""
    traffic = step_traffic(request, end.shape, end.training, kind)
    return traffic, step_seconds(request, end.shape, traffic, end.training, kind)


def all_steps(request: Request, dense: End, final: End) -> Total:
    """Every step costs what its kind does: before the first cut at one end, after the last at the other, between them
    in proportion to what is gone.
    """
    schedule, total = request.schedule, NOTHING
    costs: dict[StepKind, tuple[Total, Total]] = {}
    for step in range(1, request.steps + 1):
        kind = step_kind(request.config.prune, schedule, step)
        if kind not in costs:
            costs[kind] = _cost(request, dense, kind), _cost(request, final, kind)
        first, last = costs[kind]
        gone = schedule.target(step - 1) / schedule.ratio
        total += first * (1 - gone) + last * gone
    return total


def _cost(request: Request, end: End, kind: StepKind) -> Total:
    traffic, seconds = step_cost(request, end, kind)
    return Total(seconds.hidden, seconds.exposed, traffic.total)
