"""Bytes that one rank sends in a step and in a cut.

They are counted as `Communicator` counts. An all-gather sends the own shard to each other rank. A reduce-scatter sends
each other rank its shard. An all-reduce sends the vector once.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from loraprune_ds.model import cuts as tensors
from loraprune_ds.model.frozen import Int8
from loraprune_ds.model.per_kind import LayerKeep, LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import quality
from loraprune_ds.plan.fetching import Fetcher, PassTraffic
from loraprune_ds.plan.passes import Network, Visit
from loraprune_ds.plan.request import Request
from loraprune_ds.zero.flat import AxisCut, moved_elements
from loraprune_ds.zero.int8 import ScalePlan


@dataclass(frozen=True)
class Passes:
    """Holds what ZeRO-3 gathers at a shape.

    Attributes:
        evaluation: a forward pass.
        training: the first micro-batch of a step.
        later: each other one. With hpZ it finds second copies of LoRA.
        update_sent: bytes to all ranks for the weights that stay gathered. An update has them gathered anew.
    """

    shape: ModelShape
    evaluation: PassTraffic
    training: PassTraffic
    later: PassTraffic
    update_sent: int = 0

    def per_step(self, micro_batches: int) -> tuple[int, int]:
        """Returns the bytes that a rank sends in a step (to all ranks, to those of its group of hpZ)."""
        first, later, others = self.training, self.later, micro_batches - 1
        sent = first.sent + others * later.sent + self.update_sent
        return sent, first.sent_in_group + others * later.sent_in_group


@dataclass(frozen=True)
class StepKind:
    """Tells whether a step scores, and whether it measures inputs (`prune.compensate`)."""

    scores: bool
    measures: bool


IN_GROUP = "weights_in_group"
HEAVIEST = StepKind(scores=True, measures=True)  # that of every cut
PLAIN = StepKind(scores=False, measures=False)  # after the last cut


def step_kinds(request: Request) -> list[StepKind]:
    """Lists the kind of every step, as `Pruner` and `Compensator` find it."""
    prune, schedule = request.config.prune, request.schedule
    return [
        StepKind(
            schedule.is_scored(step),
            prune.compensate != "none" and schedule.precedes_cut(step, prune.compensate_steps),
        )
        for step in range(1, request.steps + 1)
    ]


def simulate_passes(request: Request, shapes: list[ModelShape]) -> list[Passes]:
    """Simulates the passes at each shape, in the order of a run.

    That is an evaluation, training, a cut, an evaluation, training, and so on.
    """
    network = Network(request.source, shapes[0], request.config.lora.r, request.element_size)
    fetcher = Fetcher(request.fetch_limits, request.world_size, offloaded=request.offloads("param"))
    checkpointing = request.config.train.gradient_checkpointing
    evaluation, training = network.evaluation_pass(), network.training_pass(checkpointing=checkpointing)
    found, has_copies = [], request.fetch_limits.copy_ranks > 1
    for shape in shapes:
        network.resize(shape)
        fetcher.forget_trace()
        evaluated = fetcher.run(evaluation)
        fetcher.forget_trace()
        if has_copies:  # by now
            evaluated = fetcher.run(evaluation)
            fetcher.forget_trace()
        trained = [_first_of_a_step(fetcher, training) for _ in range(3)]  # makes a record, then follows it
        later = fetcher.run(training) if has_copies else trained[-1]
        peak = max(traffic.peak_live for traffic in (*trained, later))
        first = replace(trained[-1], peak_live=peak, called=(2 + checkpointing) * network.modules)
        evaluation_pass = replace(evaluated, called=network.modules)
        found.append(Passes(shape, evaluation_pass, first, later, fetcher.end_step()))
    return found


def _first_of_a_step(fetcher: Fetcher, training: list[Visit]) -> PassTraffic:
    fetcher.end_step()
    return fetcher.run(training)


def step_sent(request: Request, passes: Passes, kind: StepKind) -> dict[str, int]:
    """Returns the bytes that a rank sends in one optimizer step, by term.

    `IN_GROUP` goes to the ranks of its group of hpZ, all else to all ranks.
    """
    shape, per_micro_batch = passes.shape, request.micro_batches
    weights, in_group = passes.per_step(per_micro_batch)
    return {
        "weights": weights,
        IN_GROUP: in_group,
        "lora_gradients": per_micro_batch * request.lora_shards(shape) * (request.world_size - 1) * 4,
        "scoring": scoring_sent(request, shape) if kind.scores else 0,
        "weight_gradients": quality.gradient_sent(request, shape) if kind.scores else 0,
        "input_moments": quality.measuring_sent(request, shape) if kind.measures else 0,
    }


def scoring_sent(request: Request, shape: ModelShape, rank: int | None = None) -> int:
    """Returns the bytes of an all-gather of LoRA (fp32 masters and gradients) and an all-reduce of fp64 scores.

    `fisher` reads no LoRA and no weights. It scores only the linears that lose inputs. Of int8 weights a few scales
    go to the neighbours.

    Args:
        rank: that sends. None: the busiest one.
    """
    criterion = request.config.prune.criterion
    if request.world_size == 1 or criterion == "random":
        return 0
    sums = 8 * score_count(request, shape)
    if criterion == "fisher":
        return sums
    lora = 2 * request.lora_shards(shape) * (request.world_size - 1) * 4
    return lora + sums + scales_sent(request, shape, rank)


def scales_sent(request: Request, shape: ModelShape, rank: int | None = None) -> int:
    """Returns the bytes of scales that the neighbours of `rank`, or of the busiest one, need to score int8 weights."""
    sizes = Counter((shape.form(x), shape.linear_shape(i, x)) for i, x in shape.linear_ids())
    total = torch.zeros(request.world_size, dtype=torch.int64)
    for (form, size), count in sizes.items():
        if isinstance(form, Int8):
            sent = ScalePlan(form, size, request.world_size).sent
            total += count * (sent.sum(1) - sent.diagonal())
    return request.element_size * int(total.max() if rank is None else total[rank])


def score_count(request: Request, shape: ModelShape) -> int:
    """Counts the scores of a step. Each part of a linear has one per group."""
    linear_ids = shape.input_linear_ids() if request.config.prune.criterion == "fisher" else shape.linear_ids()
    return sum(shape.layers[i][part.kind] for i, linear in linear_ids for part in linear.parts)


def layer_cuts(
    shape: ModelShape, index: int, keep: LayerKeep, lora_rank: int, element_size: int
) -> list[tuple[AxisCut, int]]:
    """Lists (cut, bytes of an element) of every tensor that `ShardedModel` cuts in a layer.

    LoRA counts with its fp32 master and two moments.
    """
    cuts, layer = list[tuple[AxisCut, int]](), shape.held(index, element_size)
    for name, kept, linear in tensors.layer_cuts(shape, index, keep):
        held = layer[f"model.layers.{index}.{name}"]
        cuts.append((AxisCut(held.shape, *kept), held.element_size))
        if linear:
            factors = shape.lora_shapes(index, linear, lora_rank)
            for which, stays in tensors.lora_cuts(linear, lora_rank, kept, keep):
                cuts.append((AxisCut(factors[which], *stays), element_size + 12))
    return cuts


def moved_bytes(cuts: list[tuple[AxisCut, int]], world_size: int) -> torch.Tensor:
    """Returns the (world_size,) bytes that every rank sends for such cuts."""
    total = torch.zeros(world_size, dtype=torch.int64)
    for cut, element_size in cuts:
        total += moved_elements(cut, world_size) * element_size
    return total


def cut_sent(request: Request, before: ModelShape, after: ModelShape) -> int:
    """Returns the bytes that the busiest rank sends in a cut to random groups.

    `moved_bytes` is exact for given groups. Layers of equal shape count with the same ones.
    """
    world_size = request.world_size
    if world_size == 1:
        return 0
    generator = torch.Generator().manual_seed(request.config.seed)
    sent = torch.zeros(world_size, dtype=torch.int64)
    for (old, new), layers in Counter(zip(before.layers, after.layers, strict=True)).items():
        if old != new:
            keep = _random_keep(old, new, generator)
            cuts = layer_cuts(before, before.layers.index(old), keep, request.config.lora.r, request.element_size)
            sent += layers * moved_bytes(cuts, world_size)
    return int(sent.max()) + quality.refit_sent(request, before, after)


def _random_keep(before: LayerShape, after: LayerShape, generator: torch.Generator) -> LayerKeep:
    chosen = ((kind, torch.randperm(count, generator=generator)[: after[kind]]) for kind, count in before.items())
    return LayerKeep((kind, groups.sort().values) for kind, groups in chosen)
