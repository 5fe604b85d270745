"""The plan of a run: memory over all of it, whether that fits, bytes and seconds per step and per cut."""

from dataclasses import dataclass

import numpy as np

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.memory import Stage, cut_stage, loading_stage, training_stage
from loraprune_ds.plan.options import teacher_bytes, teacher_samples
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.seconds import Seconds, cut_seconds, step_seconds, teacher_seconds
from loraprune_ds.plan.traffic import Passes, StepTraffic, cut_bytes, simulate_passes, step_traffic

MOST_CUTS = 24  # that are planned one by one; of more, as many evenly spread


@dataclass(frozen=True)
class _Change:
    """What a cut does: `number` among all cuts of the schedule, from 0, and the shapes just before and after it."""

    number: int
    step: int
    before: ModelShape
    after: ModelShape


@dataclass(frozen=True)
class PlannedCut:
    """A cut of the schedule: the fraction gone after it, a rank's state around it, what the busiest rank sends.

    `number`: among all cuts of the schedule, from 0.
    """

    number: int
    step: int
    target: float
    parameters: int
    state_before: int
    state_after: int
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a run will need, or would if it fitted.

    Attributes:
        stages: in the order of the run; the dense steps and the last ones with all their moments.
        step, last_step: traffic of an optimizer step before the first and after the last cut.
        seconds_in_all: of all steps and cuts, from `hidden` to `exposed`; evaluation, loading and saving not counted.
        teacher_bytes, teacher_seconds: of a distillation's pass before the first step: on the shared disk, and time.
    """

    request: Request
    stages: list[Stage]
    cuts: list[PlannedCut]
    step: StepTraffic
    last_step: StepTraffic
    step_seconds: Seconds
    last_step_seconds: Seconds
    seconds_in_all: tuple[float, float]
    teacher_bytes: int
    teacher_seconds: Seconds

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        """Most that a rank holds on its GPU."""
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """Most that the ranks of a node hold in host memory."""
        cluster = self.request.cluster
        reserve = int(cluster.host_reserve * (1 << 30))
        return cluster.gpus_per_node * (reserve + max(stage.host_peak for stage in self.stages))

    @property
    def fits_device(self) -> bool:
        return self.device_bytes <= self.request.cluster.gpu_bytes

    @property
    def fits_host(self) -> bool:
        return self.host_bytes <= self.request.cluster.host_bytes

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def make_plan(request: Request) -> Plan:
    """Plans the whole run. Takes seconds for LLaMA-65B, and memory for shapes only."""
    changes = _changes(request)
    first_shape, last_shape = request.shape, changes[-1].after
    dense, final = simulate_passes(request, [first_shape, last_shape])
    stages = [loading_stage(request), training_stage("dense", request, first_shape, dense.training, dense.evaluation)]
    stages += [cut_stage(f"cut at step {cut.step}", request, cut.before, cut.after) for cut in changes]
    last = training_stage("after the last cut", request, last_shape, final.training, final.evaluation, scores=False)
    stages.append(last)
    step, step_time = _step(request, first_shape, dense)
    last_step, last_time = _step(request, last_shape, final, scores=False)
    teacher = teacher_seconds(request, teacher_samples(request), dense.evaluation)
    cuts = [_plan_cut(request, change) for change in changes]
    in_all = _in_all(request, cuts, step_time, last_time)
    return Plan(request, stages, cuts, step, last_step, step_time, last_time, in_all, teacher_bytes(request), teacher)


def _changes(request: Request) -> list[_Change]:
    """All cuts of the schedule, or MOST_CUTS of them, each from the shape that the cut before it leaves."""
    steps, found = request.schedule.cut_steps(), []
    for number in _some_cuts(len(steps)):
        before, after = (steps[number - 1] if number else 0), steps[number]
        shapes = [request.shape_at(request.schedule.target(step)) for step in (before, after)]
        found.append(_Change(number, after, *shapes))
    return found


def _some_cuts(count: int) -> list[int]:
    """Numbers of the cuts to plan, of so many; the first and the last are among them."""
    if count <= MOST_CUTS:
        return list(range(count))
    return [round(i * (count - 1) / (MOST_CUTS - 1)) for i in range(MOST_CUTS)]


def _step(request: Request, shape: ModelShape, passes: Passes, *, scores: bool = True) -> tuple[StepTraffic, Seconds]:
    traffic = step_traffic(request, shape, passes.training, scores=scores)
    return traffic, step_seconds(request, shape, traffic, passes.training)


def _plan_cut(request: Request, cut: _Change) -> PlannedCut:
    sent = cut_bytes(request, cut.before, cut.after)
    before, after = (cut_stage("", request, shape, shape).resident for shape in (cut.before, cut.after))
    return PlannedCut(
        number=cut.number,
        step=cut.step,
        target=request.schedule.target(cut.step),
        parameters=cut.after.total_numel(),
        state_before=before,
        state_after=after,
        bytes_sent=sent,
        seconds=cut_seconds(request, cut.before, cut.after, sent),
    )


def _in_all(request: Request, cuts: list[PlannedCut], first: Seconds, last: Seconds) -> tuple[float, float]:
    """Steps before the first cut take the first time, after the last the other, between in proportion."""
    schedule, total = request.schedule, [0.0, 0.0]
    for step in range(1, request.steps + 1):
        gone = schedule.target(step - 1) / schedule.ratio
        for end, name in enumerate(("hidden", "exposed")):
            total[end] += getattr(first, name) + gone * (getattr(last, name) - getattr(first, name))
    of_cuts = _of_all_cuts(request, cuts, [cut.seconds for cut in cuts])
    return total[0] + of_cuts, total[1] + of_cuts


def _of_all_cuts(request: Request, cuts: list[PlannedCut], values: list[float]) -> float:
    """The sum of a value over all cuts of the schedule; between two that are planned it changes in proportion."""
    numbers = range(len(request.schedule.cut_steps()))
    return float(np.interp(numbers, [cut.number for cut in cuts], values).sum())
