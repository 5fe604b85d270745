"""Counts a run's bytes by storage, on the simulated device, beside its plan."""

import gc
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.distributed as dist

from loraprune_ds.model import adapters, codecs
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.refits import refitted
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import plan_stages, split_state
from tests.support.device import DEVICE, MEMORY, counted
from tests.support.plan_cases import STEPS, Case, build, planned_peak


@dataclass
class BesidePlan:
    """Bytes of a rank, without those that the process held before.

    Attributes:
        states: bytes beside the planned state and the average of the scores, loaded and right after the cut.
        peaks: (planned, counted) of the largest step before and after the cut, and of the cut. What is held beside the
            planned state, as scores are, is added to the plan.
        cut: what the cut took in addition, in shards of the largest layer.
        unseen: the copy of a factor that torch's solver makes by itself. Only the plan has it.
    """

    states: list[int] = field(default_factory=list)
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    cut: float = 0.0
    unseen: int = 0


def bytes_beside_plan(case: Case) -> BesidePlan:
    """Makes the steps and the cut of a case. Collective."""
    codecs._values(torch.device(DEVICE))  # a table of the process
    gc.collect()
    baseline = MEMORY.alive
    request = case.request(dist.get_world_size())
    trainer = build(request)
    found = BesidePlan()

    def held() -> int:
        gc.collect()
        return MEMORY.alive - baseline

    def compare(when: str, planned: int, peak: int) -> None:
        before = found.peaks.get(when, (0, 0))
        found.peaks[when] = max(before[0], planned), max(before[1], peak - baseline)

    found.states.append(held() - _between_steps(request, request.shape, stepped=False))
    for step in range(1, STEPS + 1):
        shape = trainer.model.shape
        scores = step <= request.schedule.last_cut
        beside = held() - _between_steps(request, shape, stepped=step > 1)
        with counted() as counts:
            trainer.step(step)
        planned = planned_peak(request, shape, scores=scores) + beside
        compare("before" if scores else "after", planned, counts.peak)
        start = held()
        with counted() as counts:
            record = trainer.cut(step)
        if record is not None:
            after = trainer.model.shape
            stage = plan_stages(request, after, after)[1]
            beside = start - _between_steps(request, shape)
            gradients = request.is_local * stage.state["lora_gradients"]
            compare("in", stage.peak - gradients + beside, counts.peak)
            layers = [request.stored_as(*layer.tensors) for layer in shape.layers]
            extra = counts.peak - baseline - start
            found.cut = extra / max(map(request.shard_bytes, layers))
            averages = 8 * sum(sum(layer.values()) for layer in after.counts)
            found.states.append(held() - _between_steps(request, after) - averages)
            kept = max((linear.inputs for _, linear in refitted(request, after)), default=0)
            found.unseen = 4 * kept**2
    return found


def bytes_of_wide_layers(case: Case) -> BesidePlan:
    """Does the same as if layers were too wide to be gathered as one. Collective."""
    with patch.object(adapters, "LEAF_LAYER_HIDDEN", 0):
        return bytes_beside_plan(case)


def _between_steps(request: Request, shape: ModelShape, *, stepped: bool = True) -> int:
    """Returns the planned bytes. One process has no gradients then, and moments come with the first step."""
    terms, _ = split_state(request, shape)
    terms["lora_gradients"] *= not request.is_local
    terms["lora_moments"] *= stepped
    return sum(terms.values())
