"""Bytes sent (at most) and seconds (estimates) of a step, a cut and the whole run. README.md has the formulas."""

from dataclasses import dataclass
from typing import NamedTuple

from loraprune_ds.model.shape import ModelShape, active_numel, attention_product
from loraprune_ds.plan import refits
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import passes_of_weights

IN_GROUP = "weights_in_group"  # sent inside a group of hpZ. Other bytes go to all ranks
StepKind = tuple[bool, bool]  # (the step scores, the step measures inputs for `prune.compensate`)
STEP_KINDS: list[StepKind] = [(False, False), (False, True), (True, False), (True, True)]


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

    def plus(self, more: "Total", times: float) -> "Total":
        """Adds another total, so many times."""
        return Total(*(value + times * other for value, other in zip(self, more, strict=True)))


def step_cost(request: Request, shape: ModelShape, kind: StepKind) -> Cost:
    """Returns the cost of one optimizer step."""
    train = request.config.train
    tokens = train.global_batch_size * request.config.data.window / request.world_size
    sent = step_sent(request, shape, kind)
    return _cost(request, sent, tokens * _flops_per_token(request, shape, kind))


def step_sent(request: Request, shape: ModelShape, kind: StepKind) -> dict[str, int]:
    """Returns the bytes that a rank sends in one optimizer step, by term."""
    scores, measures = kind
    micro = request.micro_batches
    others = request.world_size - 1
    sent = _weights_sent(request, shape)
    sent["lora_gradients"] = 4 * micro * request.lora_shards(shape) * others
    sent["scoring"] = _scores_sent(request, shape) if scores else 0
    sent["input_moments"] = refits.sent_in_a_step(request, shape) if measures else 0
    return sent


def _weights_sent(request: Request, shape: ModelShape) -> dict[str, int]:
    """Returns the bytes sent by passes that gather all weights. hpZ copies LoRA again in every step."""
    others = request.world_size - 1
    group = request.fetch.zero_hpz_partition_size
    stored = request.stored(shape)
    factors = request.element_size * request.lora_shards(shape)
    shards = passes_of_weights(request, shape) * (request.shard_bytes(stored) + factors)
    shards += request.shard_bytes(request.taught)
    if shape.family.has_encoder:  # the decoder reads the embedding again, and the teacher's, too
        shards += (1 + bool(request.taught)) * request.shard_bytes(stored[:1])
    shards *= request.micro_batches
    if group == 1:
        return {"weights": shards * others, IN_GROUP: 0}
    in_group = (shards - factors) * (group - 1) * (request.world_size // group)
    return {"weights": factors * others, IN_GROUP: in_group}


def _scores_sent(request: Request, shape: ModelShape) -> int:
    criterion = request.config.prune.criterion
    others = request.world_size - 1
    if others == 0 or criterion == "random":
        return 0
    if criterion == "fisher":
        linears = shape.input_linears()
        return 8 * sum(run.scores for _, linear in linears for run in linear.spans)
    groups = sum(run.groups for _, linear in shape.linears() for run in linear.spans)
    return 8 * groups + 8 * request.lora_shards(shape) * others


def cut_cost(request: Request, before: ModelShape, after: ModelShape) -> Cost:
    """Returns the cost of a cut: shards of smaller layers with LoRA's state, and refitted linears."""
    sent = {"cut": 0}
    if request.world_size == 1:
        return _cost(request, sent, 0)
    cut = [i for i, counts in enumerate(after.counts) if counts != before.counts[i]]
    cut_layers = before.only(cut)
    tensors = [tensor for layer in cut_layers.layers for tensor in layer.tensors]
    frozen = request.shard_bytes(request.stored_as(*tensors))
    bytes_per_factor = 12 + request.element_size
    lora = bytes_per_factor * request.lora_shards(cut_layers)
    sent["cut"] = frozen + lora + refits.sent_in_a_cut(request, before, cut)
    return _cost(request, sent, 0)


def all_steps(request: Request, final: ModelShape) -> Total:
    """Adds up all steps. Costs fall linearly with the parameters from the dense to the final shape."""
    prune = request.config.prune
    schedule = request.schedule
    first = {kind: step_cost(request, request.shape, kind).total for kind in STEP_KINDS}
    last = {kind: step_cost(request, final, kind).total for kind in STEP_KINDS}
    total = Total(0, 0, 0)
    for n in range(1, schedule.steps + 1):
        measures = request.refits and schedule.precedes_cut(n, prune.compensate_steps)
        kind = (schedule.is_scored(n), measures)
        removed = schedule.target(n - 1) / schedule.ratio
        total = total.plus(first[kind], 1 - removed).plus(last[kind], removed)
    return total


def _cost(request: Request, sent: dict[str, int], operations: float) -> Cost:
    cluster = request.cluster
    ranks = request.world_size
    group = request.fetch.zero_hpz_partition_size
    in_group = sent.get(IN_GROUP, 0)
    to_all = sum(sent.values()) - in_group
    host_copies = 0
    if request.offloads("param"):
        shards = sent.get("weights", 0) / max(1, ranks - 1) + in_group / max(1, group - 1)
        host_copies = shards / (cluster.host_bandwidth * 1e9)
    seconds = cluster.seconds_to_receive(to_all, ranks)
    seconds += cluster.seconds_to_receive(in_group, group)
    between_nodes = cluster.between_nodes(to_all, ranks)
    between_nodes += cluster.between_nodes(in_group, group)
    return Cost(
        sent,
        between_nodes,
        compute=operations / (cluster.flops * cluster.utilisation * 1e12),
        communication=seconds,
        host_copies=host_copies,
    )


def _flops_per_token(request: Request, shape: ModelShape, kind: StepKind) -> float:
    """Returns the operations of a step per token. A multiply-add is two."""
    again = request.config.train.gradient_checkpointing
    window = request.config.data.window
    part = 1 if request.batch(1, 1).eager else 2  # eager attends to all of the window
    flops = (4 + 2 * again) * active_numel(shape)  # LoRA's own products are below 1 %
    flops += (7 + 2 * again) * attention_product(shape, window) / part
    flops += 4 * shape.vocab_size * shape.hidden_size
    if kind[1]:
        flops += refits.flops_per_token(request, shape)
    if request.taught:
        flops += 2 * active_numel(request.shape)
        flops += 2 * attention_product(request.shape, window) / part
    return flops / len(shape.layer_lists)  # a token passes either the encoder or the decoder
