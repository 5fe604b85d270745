"""Bytes that one rank sends in a step and in a cut, by collective.

Counted as `Communicator` counts: an all-gather sends this rank's piece to each other rank, a reduce-scatter each other
rank its piece, an all-reduce the vector once.
"""

from dataclasses import dataclass, replace

import torch

from loraprune_ds.model.family import KINDS
from loraprune_ds.model.shapes import LayerShape, ModelShape
from loraprune_ds.plan import options
from loraprune_ds.plan.fetching import Fetcher, PassTraffic
from loraprune_ds.plan.passes import Network
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.steps import StepKind
from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.zero.ds_config import FetchLimits
from loraprune_ds.zero.flat import AxisCut, moved_elements, partition_numel


@dataclass(frozen=True)
class Passes:
    """What ZeRO-3 gathers in one evaluation and one training micro-batch at a shape, once it has its record."""

    evaluation: PassTraffic
    training: PassTraffic


@dataclass(frozen=True)
class StepTraffic:
    """Bytes a rank sends in one optimizer step."""

    weights: int
    lora_gradients: int
    scoring: int
    weight_gradients: int = 0
    input_moments: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.lora_gradients + self.scoring + self.weight_gradients + self.input_moments


def simulate_passes(request: Request, shapes: list[ModelShape]) -> list[Passes]:
    """What is gathered at each of the shapes a run goes through, in the order in which the run meets them.

    As a run does it: an evaluation, training, a cut, training with the smaller shape, an evaluation, and so on.
    """
    network = Network(shapes[0], request.config.lora.r)
    limits = FetchLimits.from_ds_config(request.ds_config)
    fetcher = Fetcher(limits, request.cluster.world_size, offloaded=request.offloads("param"))
    checkpointing = request.config.train.gradient_checkpointing
    evaluation, training = network.evaluation_pass(), network.training_pass(checkpointing=checkpointing)
    found = []
    for index, shape in enumerate(shapes):
        if index:
            network.resize(shape)
            fetcher.forget_trace()
        evaluated = fetcher.run(evaluation)
        fetcher.forget_trace()
        trained = [fetcher.run(training) for _ in range(3)]  # makes a record, then follows it
        peak = max(traffic.peak_live for traffic in trained)
        found.append(Passes(evaluated, replace(trained[-1], peak_live=peak)))
    return found


def step_traffic(request: Request, shape: ModelShape, training: PassTraffic, kind: StepKind) -> StepTraffic:
    """A step of `gradient_accumulation_steps` micro-batches."""
    world_size = request.cluster.world_size
    micro_batches = request.config.train.gradient_accumulation_steps(world_size)
    lora = sum(lora_pieces(request, shape))
    return StepTraffic(
        weights=micro_batches * training.sent * request.element_size,
        lora_gradients=micro_batches * lora * (world_size - 1) * 4,
        scoring=scoring_bytes(request, shape) if kind.scores else 0,
        weight_gradients=options.gradient_bytes(request, shape) if kind.scores else 0,
        input_moments=options.measuring_bytes(request, shape) if kind.measures else 0,
    )


def scoring_bytes(request: Request, shape: ModelShape) -> int:
    """One all-gather per layer of LoRA masters and gradients in fp32, one all-reduce of all scores in fp64."""
    world_size = request.cluster.world_size
    if world_size == 1 or request.config.prune.criterion == "random":
        return 0
    gathered = 2 * sum(lora_pieces(request, shape)) * (world_size - 1) * 4
    groups = sum(layer.count(linear.kind) for layer in shape.layers for linear in shape.linears)
    return gathered + groups * 8


def lora_pieces(request: Request, shape: ModelShape) -> list[int]:
    """Elements of this rank's piece of every LoRA factor."""
    return [partition_numel(n, request.cluster.world_size) for n in shape.lora_sizes(request.config.lora.r)]


def layer_cuts(shape: ModelShape, index: int, keep: LayerKeep, lora_rank: int) -> list[tuple[AxisCut, bool]]:
    """(cut, of LoRA) of every tensor of a layer that shrinks, as `ShardedModel` cuts them."""
    cuts = []
    for linear in shape.linears:
        if not keep.cuts(shape.layers[index], linear.kind):
            continue
        out_features, in_features = shape.linear_shape(index, linear)
        rows = keep.indices(shape, index, linear.parts)
        factor = (out_features, lora_rank) if linear.axis == 0 else (lora_rank, in_features)
        cuts += [(AxisCut((out_features, in_features), linear.axis, rows), False)]
        cuts += [(AxisCut(factor, linear.axis, rows), True)]
        if shape.has_bias(linear) and linear.axis == 0:
            cuts.append((AxisCut((out_features,), 0, rows), False))
    return cuts


def moved_bytes(
    cuts: list[tuple[AxisCut, bool]], world_size: int, element_size: int, *, stepped: bool = True
) -> torch.Tensor:
    """(W,) bytes that every rank sends for the cut of a layer: weights, LoRA copies, fp32 masters and moments."""
    total = torch.zeros(world_size, dtype=torch.int64)
    for cut, is_lora in cuts:
        per_element = element_size + ((12 if stepped else 4) if is_lora else 0)
        total += moved_elements(cut, world_size) * per_element
    return total


def random_keep(before: ModelShape, after: ModelShape, index: int, generator: torch.Generator) -> LayerKeep:
    """A seeded random choice of the groups that stay in a layer."""
    chosen = []
    for kind in KINDS:
        count, left = before.layers[index].count(kind), after.layers[index].count(kind)
        chosen.append(torch.randperm(count, generator=generator)[:left].sort().values)
    return LayerKeep(*chosen)


def cut_bytes(request: Request, before: ModelShape, after: ModelShape) -> int:
    """Bytes that the busiest rank sends in a cut, if the groups that stay are a random choice.

    What is sent depends on the mask; `moved_bytes` is exact for a given one. Layers of equal shape count with one mask.
    """
    world_size = request.cluster.world_size
    if world_size == 1:
        return 0
    kinds: dict[tuple[LayerShape, LayerShape], list[int]] = {}
    for index, change in enumerate(zip(before.layers, after.layers, strict=True)):
        if change[0] != change[1]:
            kinds.setdefault(change, []).append(index)
    generator = torch.Generator().manual_seed(request.config.seed)
    sent = torch.zeros(world_size, dtype=torch.int64)
    for layers in kinds.values():
        keep = random_keep(before, after, layers[0], generator)
        cuts = layer_cuts(before, layers[0], keep, request.config.lora.r)
        sent += len(layers) * moved_bytes(cuts, world_size, request.element_size)
    return int(sent.max()) + options.refit_bytes(request, before, after)
