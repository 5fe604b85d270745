"""The plan of a run: memory, bytes sent, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.costs import StepCost, Total, all_steps, cut_cost, step_cost
from loraprune_ds.plan.distillation_pass import DistillationPass
from loraprune_ds.plan.held import checkpoint_terms, split_state
from loraprune_ds.plan.request import Request, changed
from loraprune_ds.plan.stages import Stage, cut_stage, exported_stage, loading_stage, training_stage
from loraprune_ds.plan.traffic import HEAVIEST, PLAIN, Passes, simulate_passes

MOST_CUTS = 24  # that are planned one by one and shown
MOST_SUMMED = 240  # whose bytes and seconds are computed, to be added up
ShapedCut = tuple[int, ModelShape, ModelShape]  # its step, the shapes before and after


@dataclass(frozen=True)
class PlannedCut:
    """Describes a cut.

    Attributes:
        target: the fraction that is gone after it.
        state_before, state_after: bytes of a rank.
        bytes_sent: by the busiest rank.
    """

    step: int
    target: float
    parameters: int
    state_before: int
    state_after: int
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Holds the needs of a run, whether it fits or not.

    Attributes:
        passes: what ZeRO-3 gathers at the dense and at the final shape.
        stages: in the order of the run.
        step: an optimizer step before the first cut. It scores and measures all it can.
        last_step: one after the last cut.
        in_all: all steps, all cuts, the dense model's pass. Evaluations, loading and saving are not counted.
        checkpoint: bytes of one on the shared disk, by term.
        teacher, teacher_bytes: the dense model's pass for a distillation, and its bytes on the shared disk.
    """

    request: Request
    passes: tuple[Passes, Passes]
    stages: list[Stage]
    cuts: list[PlannedCut]
    step: StepCost
    last_step: StepCost
    in_all: Total
    checkpoint: dict[str, int]
    teacher: StepCost
    teacher_bytes: int

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        """Returns the most that a rank holds on its GPU."""
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """Returns the most that a node's ranks hold in host memory."""
        cluster = self.request.cluster
        return cluster.gpus_per_node * (int(cluster.host_reserve * GIB) + max(x.host_peak for x in self.stages))

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
    """Plans the whole run, within seconds for LLaMA-65B."""
    planned = planned_cuts(request)
    dense, final = simulate_passes(request, [request.shape, request.shape_at(request.schedule.ratio)])
    teacher = DistillationPass(request, dense.evaluation)
    return Plan(
        request=request,
        passes=(dense, final),
        stages=plan_stages(request, dense, final, planned),
        cuts=[_plan_cut(request, *cut) for cut in planned],
        step=step_cost(request, dense, HEAVIEST),
        last_step=step_cost(request, final, PLAIN),
        in_all=Total(*(all_steps(request, dense, final) + _all_cuts(request) + teacher.cost().total).tolist()),
        checkpoint=checkpoint_terms(request, after_first_cut=planned[0][-1]),
        teacher=teacher.cost(),
        teacher_bytes=teacher.disk_bytes,
    )


def plan_stages(request: Request, dense: Passes, final: Passes, cuts: Sequence[ShapedCut]) -> list[Stage]:
    """Plans the memory of the run, stage by stage."""
    teacher = DistillationPass(request, dense.evaluation)
    return [
        loading_stage(request),
        *([teacher.stage()] if request.config.train.distill_weight else []),
        training_stage("dense", request, dense),
        *(cut_stage(f"cut at step {step}", request, before, after) for step, before, after in cuts),
        training_stage("after the last cut", request, final, scores=False),
        *_exported(request),
    ]


def _exported(request: Request) -> list[Stage]:
    """Plans the evaluation of the exported model. Without int8 weights it needs less than the one that was trained."""
    if not request.shape.int8:
        return []
    stock = changed(request, model={"frozen": None})
    return [exported_stage(stock, simulate_passes(stock, [stock.shape_at(stock.schedule.ratio)])[0])]


def planned_cuts(request: Request) -> list[ShapedCut]:
    """Lists the cuts that are planned one by one."""
    return list(_cuts(request, MOST_CUTS).values())


def _cuts(request: Request, most: int) -> dict[int, ShapedCut]:
    """Finds all cuts, by number.

    Of more than `most` cuts it takes so many, evenly spread from the first to the last.
    """
    steps = request.schedule.cut_steps()
    numbers = range(len(steps))
    if len(steps) > most:
        numbers = [round(i * (len(steps) - 1) / (most - 1)) for i in range(most)]
    shapes = [[request.shape_at(request.schedule.target(step)) for step in ([0, *steps][n], steps[n])] for n in numbers]
    return {n: (steps[n], before, after) for n, (before, after) in zip(numbers, shapes, strict=True)}


def _plan_cut(request: Request, step: int, before: ModelShape, after: ModelShape) -> PlannedCut:
    state_before, state_after = (split_state(request, shape, measures=True)[0] for shape in (before, after))
    sent, seconds = cut_cost(request, before, after)
    return PlannedCut(
        step=step,
        target=request.schedule.target(step),
        parameters=after.total_numel(),
        state_before=sum(state_before.values()),
        state_after=sum(state_after.values()),
        bytes_sent=sent,
        seconds=seconds,
    )


def _all_cuts(request: Request) -> np.ndarray:
    """Returns the total of all cuts. Bytes and seconds of those between two known ones are interpolated."""
    cuts, numbers = _cuts(request, MOST_SUMMED), range(len(request.schedule.cut_steps()))
    costs = [cut_cost(request, before, after) for _, before, after in cuts.values()]
    sent, seconds = (float(np.interp(numbers, list(cuts), values).sum()) for values in zip(*costs, strict=True))
    return np.array([seconds, seconds, sent])
