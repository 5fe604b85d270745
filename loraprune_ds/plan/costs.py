"""Bytes sent (at most) and seconds (estimates) of a step, a cut and the whole run. README.md has the formulas."""

from dataclasses import dataclass
from typing import NamedTuple

from loraprune_ds.model.frozen import StoredTensor
from loraprune_ds.model.shape import ModelShape, active_numel, attention_product
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import full_bytes, passes_of_weights
from loraprune_ds.pruning.compensate import numel_sent

IN_GROUP = "weights_in_group"  # sent inside a group of hpZ. Other bytes go to all ranks
StepKind = tuple[bool, bool]  # (the step scores, the step measures inputs for `prune.compensate`)


@dataclass(frozen=True)
class Cost:
    """Holds the bytes that a rank sends by term, how many go to other nodes, and seconds."""

    sent: dict[str, int]
    between_nodes: float
    compute: float
    communication: float
    host_copies: float  # of offloaded weights

    @property
    def total(self) -> "Total":
        seconds = (self.compute, self.communication, self.host_copies)
        return Total(max(seconds), sum(seconds), sum(self.sent.values()))


class Total(NamedTuple):
    """Holds the seconds with full overlap, the seconds without overlap, and bytes sent."""

    at_least: float
    at_most: float
    bytes_sent: float


def step_cost(request: Request, shape: ModelShape, kind: StepKind) -> Cost:
    """Returns the cost of one optimizer step."""
    tokens = (
        request.config.train.global_batch_size * request.config.data.window / request.world_size
    )
    return _cost(
        request, step_sent(request, shape, kind), tokens * _flops_per_token(request, shape, kind)
    )


def step_sent(request: Request, shape: ModelShape, kind: StepKind) -> dict[str, int]:
    """Returns the bytes that a rank sends in one optimizer step, by term."""
    others, micro, criterion = (
        request.world_size - 1,
        request.micro_batches,
        request.config.prune.criterion,
    )
    lora, scoring, moments, (scores, measures) = request.lora_shards(shape), 0, 0, kind
    if scores and others and criterion != "random":
        linears = shape.input_linears() if criterion == "fisher" else shape.linears()
        scoring = 8 * sum(
            run.scores if criterion == "fisher" else run.groups
            for _, x in linears
            for run in x.spans
        )
        scoring += 0 if criterion == "fisher" else 8 * lora * others
    if measures and others and (measured := request.measured(shape)):
        moments = 8 + 4 * micro * sum(numel_sent(x.matrix[1]) for _, x in measured)
    weights = _gathers(
        request, request.stored(shape), passes_of_weights(request, shape) * micro, lora
    )
    # the decoder reads it after the encoder
    embedding = request.stored(shape)[:1] if shape.family.has_encoder else []
    for again, passes in ((request.taught, micro), (embedding, (1 + bool(request.taught)) * micro)):
        for term, sent in _gathers(request, again, passes).items():
            weights[term] += sent
    return {
        **weights,
        "lora_gradients": 4 * micro * lora * others,
        "scoring": scoring,
        "input_moments": moments,
    }


def cut_cost(request: Request, before: ModelShape, after: ModelShape) -> Cost:
    """Returns the cost of a cut: shards of smaller layers with LoRA's state, and refitted linears."""
    cut = [i for i in range(len(after.layers)) if before.counts[i] != after.counts[i]]
    lora = sum(request.shard_numel(before.layers[i].lora_numel(request.config.lora.r)) for i in cut)
    frozen = sum(request.shard_bytes(request.stored_as(*before.layers[i].tensors)) for i in cut)
    refitted = full_bytes(
        request.stored_as(*(linear for i, linear in request.measured(before) if i in cut))
    )
    sent = frozen + (12 + request.element_size) * lora + 2 * refitted  # to the owner and back
    return _cost(request, {"cut": sent if request.world_size > 1 else 0}, 0)


def all_steps(request: Request, final: ModelShape) -> Total:
    """Adds up all steps. Costs fall linearly with the parameters from the dense to the final shape."""
    prune, schedule, total = request.config.prune, request.schedule, Total(0, 0, 0)
    kinds: list[StepKind] = [(False, False), (False, True), (True, False), (True, True)]
    known = {
        kind: [step_cost(request, x, kind).total for x in (request.shape, final)] for kind in kinds
    }
    for n in range(1, request.schedule.steps + 1):
        measures = prune.compensate != "none" and schedule.precedes_cut(n, prune.compensate_steps)
        gone = schedule.target(n - 1) / schedule.ratio
        first, last = known[schedule.is_scored(n), measures]
        total = Total(
            *(t + x * (1 - gone) + y * gone for t, x, y in zip(total, first, last, strict=True))
        )
    return total


def _gathers(
    request: Request, weights: list[StoredTensor], passes: int, lora_shards: int = 0
) -> dict[str, int]:
    """Returns the bytes sent by passes that gather all weights. hpZ copies LoRA again in every step."""
    others, group = request.world_size - 1, request.fetch.zero_hpz_partition_size
    factors = request.element_size * lora_shards
    shards = request.shard_bytes(weights) + factors
    if group == 1:
        return {"weights": passes * shards * others, IN_GROUP: 0}
    in_group = (passes * shards - factors) * (group - 1) * (request.world_size // group)
    return {"weights": factors * others, IN_GROUP: in_group}


def _cost(request: Request, sent: dict[str, int], operations: float) -> Cost:
    cluster, size, group = (
        request.cluster,
        request.world_size,
        request.fetch.zero_hpz_partition_size,
    )
    in_group = sent.get(IN_GROUP, 0)
    to_all = sum(sent.values()) - in_group
    shards = sent.get("weights", 0) / max(1, size - 1) + in_group / max(1, group - 1)
    return Cost(
        sent,
        between_nodes=cluster.between_nodes(to_all, size) + cluster.between_nodes(in_group, group),
        compute=operations / (cluster.flops * cluster.utilisation * 1e12),
        communication=cluster.seconds_to_receive(to_all, size)
        + cluster.seconds_to_receive(in_group, group),
        host_copies=shards / (cluster.host_bandwidth * 1e9) if request.offloads("param") else 0,
    )


def _flops_per_token(request: Request, shape: ModelShape, kind: StepKind) -> float:
    """Returns the operations of a step per token. A multiply-add is two."""
    again = request.config.train.gradient_checkpointing
    # eager attends to all of it
    window, part = request.config.data.window, 1 if request.batch(1, 1).eager else 2
    per_token = (4 + 2 * again) * active_numel(shape)  # LoRA's own products are below 1 %
    per_token += (7 + 2 * again) * attention_product(
        shape, window
    ) / part + 4 * shape.vocab_size * shape.hidden_size
    if kind[1]:
        per_token += sum(2 * numel_sent(x.matrix[1]) for _, x in request.measured(shape))
    if request.taught:
        per_token += (
            2 * active_numel(request.shape) + 2 * attention_product(request.shape, window) / part
        )
    return per_token / len(shape.layer_lists)  # a token passes either the encoder or the decoder
