"""Bytes sent (at most) and seconds (estimates) of a step, a cut and the whole run. README.md has the formulas."""

from dataclasses import dataclass
from typing import NamedTuple

from loraprune_ds.model.shape import ModelShape, active_numel, attention_product
from loraprune_ds.plan import refits
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import passes_of_weights

IN_GROUP = "weights_in_group"  # sent inside a group of hpZ. Other bytes go to all ranks


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


def step_cost(request: Request, shape: ModelShape, *, scores: bool) -> Cost:
    """Returns the cost of one optimizer step."""
    train = request.config.train
    tokens = train.global_batch_size * request.config.data.window / request.world_size
    sent = step_sent(request, shape, scores=scores)
    return _cost(request, sent, tokens * _flops_per_token(request, shape))


def step_sent(request: Request, shape: ModelShape, *, scores: bool) -> dict[str, int]:
    """Returns the bytes that a rank sends in one optimizer step, by term."""
    micro = request.micro_batches
    others = request.world_size - 1
    sent = _weights_sent(request, shape)
    sent["lora_gradients"] = 4 * micro * request.lora_shards(shape) * others
    sent["scoring"] = _scores_sent(request, shape) if scores else 0
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
    tokens = refits.repeated_tokens(request, before)
    operations = _forward_flops(request, before) + refits.flops_per_token(request, before)
    operations *= tokens / len(before.layer_lists)
    sent = {"cut": 0}
    if request.world_size == 1:
        return _cost(request, sent, operations)
    cut = [i for i, counts in enumerate(after.counts) if counts != before.counts[i]]
    cut_layers = before.only(cut)
    tensors = [tensor for layer in cut_layers.layers for tensor in layer.tensors]
    frozen = request.shard_bytes(request.stored_as(*tensors))
    bytes_per_factor = 12 + request.element_size
    lora = bytes_per_factor * request.lora_shards(cut_layers)
    sent["cut"] = frozen + lora + refits.sent_in_a_cut(request, before, cut)
    return _cost(request, sent, operations)


def all_steps(request: Request, final: ModelShape) -> Total:
    """Adds up all steps. Costs fall linearly with the parameters from the dense to the final shape."""
    schedule = request.schedule
    kinds = (False, True)
    first = [step_cost(request, request.shape, scores=scores).total for scores in kinds]
    last = [step_cost(request, final, scores=scores).total for scores in kinds]
    total = Total(0, 0, 0)
    for n in range(1, schedule.steps + 1):
        kind = schedule.is_scored(n)
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


def _flops_per_token(request: Request, shape: ModelShape) -> float:
    """Returns the operations of a step per token. A multiply-add is two."""
    passes = 2 + request.config.train.gradient_checkpointing
    # LoRA's own products are below 1 %. A backward pass has five products of attention, not two
    flops = passes * _forward_flops(request, shape)
    flops += 3 * attention_product(shape, request.config.data.window) / _part(request)
    flops += 4 * shape.vocab_size * shape.hidden_size
    if request.taught:
        flops += _forward_flops(request, request.shape)
    return flops / len(shape.layer_lists)  # a token passes either the encoder or the decoder


def _forward_flops(request: Request, shape: ModelShape) -> float:
    """Returns the operations of a forward pass per token, without the head."""
    products = 2 * attention_product(shape, request.config.data.window) / _part(request)
    return 2 * active_numel(shape) + products


def _part(request: Request) -> int:
    """Returns the part of a window that a token attends to: eager attention computes all of it."""
    return 1 if request.batch(1, 1).eager else 2
