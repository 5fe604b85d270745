"""The plan of a run: memory over all of it, whether that fits, bytes and seconds per step and per cut."""

from dataclasses import dataclass

import numpy as np

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import teacher
from loraprune_ds.plan.disk import checkpoint_terms
from loraprune_ds.plan.memory import Stage, cut_stage, loading_stage, training_stage
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.seconds import Seconds, cut_seconds
from loraprune_ds.plan.steps import HEAVIEST, PLAIN
from loraprune_ds.plan.totals import End, Total, all_steps, step_cost
from loraprune_ds.plan.traffic import StepTraffic, cut_bytes, simulate_passes

MOST_CUTS = 24  # that are planned one by one; of more, as many evenly spread
MOST_SUMMED = 240  # whose bytes and seconds are added up; of more, as many, and what lies between is interpolated


@dataclass(frozen=True)
class _Change:
    """What a cut does: `number` among all cuts of the schedule, from 0, and the shapes just before and after it."""

    number: int
    step: int
    before: ModelShape
    after: ModelShape


@dataclass(frozen=True)
class PlannedCut:
    """A cut of the schedule: the fraction gone after it, a rank's state around it, what the busiest rank sends."""

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
        stages: in the order of the run; the dense steps and the last ones with all their phases.
        step, last_step: traffic of an optimizer step before the first cut, that scores and measures all it can, and of
            one after the last.
        in_all: of all steps and cuts and the uncut model's pass; evaluation, loading and saving not counted.
        checkpoint: bytes of one on the shared disk, by term; keep_last and one more are there while one is written.
        teacher_bytes, teacher_seconds: of a distillation's pass before the first step: on the shared disk, and time.
    """

    request: Request
    stages: list[Stage]
    cuts: list[PlannedCut]
    step: StepTraffic
    last_step: StepTraffic
    step_seconds: Seconds
    last_step_seconds: Seconds
    in_all: Total
    checkpoint: dict[str, int]
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
    changes = _changes(request, MOST_CUTS)
    first_shape, last_shape = request.shape, changes[-1].after
    dense, final = simulate_passes(request, [first_shape, last_shape])
    stages = [loading_stage(request)]
    if request.config.train.distill_weight:
        stages.append(teacher.stage(request, dense.evaluation))
    stages.append(training_stage("dense", request, first_shape, dense.training, dense.evaluation))
    stages += [cut_stage(f"cut at step {cut.step}", request, cut.before, cut.after) for cut in changes]
    last = training_stage("after the last cut", request, last_shape, final.training, final.evaluation, scores=False)
    stages.append(last)
    ends = End(first_shape, dense.training), End(last_shape, final.training)
    step, step_time = step_cost(request, ends[0], HEAVIEST)
    last_step, last_time = step_cost(request, ends[1], PLAIN)
    first_pass = teacher.seconds(request, dense.evaluation)
    of_teacher = Total(first_pass.hidden, first_pass.exposed, teacher.sent(request, dense.evaluation))
    cuts = [_plan_cut(request, change) for change in changes]
    in_all = all_steps(request, *ends) + _all_cuts(request) + of_teacher
    return Plan(
        request=request,
        stages=stages,
        cuts=cuts,
        step=step,
        last_step=last_step,
        step_seconds=step_time,
        last_step_seconds=last_time,
        in_all=in_all,
        checkpoint=checkpoint_terms(request, changes[0].after),
        teacher_bytes=teacher.disk_bytes(request),
        teacher_seconds=first_pass,
    )


def _changes(request: Request, most: int) -> list[_Change]:
    """All cuts of the schedule, or `most` of them, each from the shape that the cut before it leaves."""
    steps, found = request.schedule.cut_steps(), []
    for number in _evenly(len(steps), most):
        before, after = (steps[number - 1] if number else 0), steps[number]
        shapes = [request.shape_at(request.schedule.target(step)) for step in (before, after)]
        found.append(_Change(number, after, *shapes))
    return found


def _evenly(count: int, most: int) -> list[int]:
    """Numbers below `count`, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _plan_cut(request: Request, cut: _Change) -> PlannedCut:
    sent, seconds = _cost(request, cut)
    before, after = (cut_stage("", request, shape, shape).resident for shape in (cut.before, cut.after))
    return PlannedCut(
        step=cut.step,
        target=request.schedule.target(cut.step),
        parameters=cut.after.total_numel(),
        state_before=before,
        state_after=after,
        bytes_sent=sent,
        seconds=seconds,
    )


def _cost(request: Request, cut: _Change) -> tuple[int, float]:
    """(bytes that the busiest rank sends, seconds)."""
    sent = cut_bytes(request, cut.before, cut.after)
    return sent, cut_seconds(request, cut.before, cut.after, sent)


def _all_cuts(request: Request) -> Total:
    """Of all cuts of the schedule; between two that are added up bytes and seconds change in proportion."""
    changes, numbers = _changes(request, MOST_SUMMED), range(len(request.schedule.cut_steps()))
    costs = [_cost(request, change) for change in changes]
    known = [change.number for change in changes]
    sent, seconds = (float(np.interp(numbers, known, values).sum()) for values in zip(*costs, strict=True))
    return Total(seconds, seconds, sent)
