"""How long a step and a cut take: arithmetic and bytes over what the cluster is said to sustain.

Estimates, unlike memory and bytes: no kernel reaches one rate at every size, latencies are not counted, and how much of
the communication hides behind the arithmetic is not known, so a step has a lower and an upper end.
"""

from dataclasses import dataclass

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import options
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.steps import StepKind
from loraprune_ds.plan.traffic import StepTraffic


@dataclass(frozen=True)
class Seconds:
    """Of one step: arithmetic, communication, and copies from host memory under parameter offload.

    `hidden`: the longest of them, if everything overlaps. `exposed`: their sum, if nothing does.
    """

    compute: float
    communication: float
    host_copies: float

    @property
    def hidden(self) -> float:
        return max(self.compute, self.communication, self.host_copies)

    @property
    def exposed(self) -> float:
        return self.compute + self.communication + self.host_copies


def flops_per_token(request: Request, shape: ModelShape) -> float:
    """Of training, per token: a multiply-add is two.

    Linears: 2 forward, 2 for the gradient of their input (the weights are frozen), 2 more if recomputed. LoRA: 2
    forward, 4 backward, 2. Attention: two products forward, five backward, two. Head: logits and the gradient of their
    input, once.
    """
    again = int(request.config.train.gradient_checkpointing)
    lora = sum(shape.lora_sizes(request.config.lora.r))
    product = attention_product(request, shape)
    linears = (4 + 2 * again) * shape.linear_numel() + (6 + 2 * again) * lora
    return linears + (7 + 2 * again) * product + 4 * shape.vocab_size * shape.hidden_size


def attention_product(request: Request, shape: ModelShape) -> float:
    """Per token, of all layers: over half a window on average, or with `eager` over all of it and its mask."""
    query_width = sum(layer.heads for layer in shape.layers) * shape.queries_per_group * shape.head_dim
    return 2 * query_width * request.config.data.window / (1 if request.eager else 2)


def scoring_flops(request: Request, shape: ModelShape) -> float:
    """Of one rank, for the weights it owns: B·A, and where the gradient is estimated that, with twice the rank."""
    criterion, rank = request.config.prune.criterion, request.config.lora.r
    per_weight = {"random": 0, "magnitude": 2 * rank, "gradient": 2 * rank}.get(criterion, 6 * rank)
    return per_weight * shape.linear_numel() / request.cluster.world_size


def step_seconds(
    request: Request, shape: ModelShape, traffic: StepTraffic, training: PassTraffic, kind: StepKind
) -> Seconds:
    """One optimizer step."""
    cluster, train = request.cluster, request.config.train
    tokens = train.global_batch_size * request.config.data.window / cluster.world_size
    flops = flops_per_token(request, shape) * tokens
    if kind.scores:
        flops += options.gradient_flops(request, shape) * tokens + scoring_flops(request, shape)
    if kind.measures:
        flops += options.measuring_flops(request, shape) * tokens
    shards = training.sent / max(1, cluster.world_size - 1) * request.element_size
    copied = shards * train.gradient_accumulation_steps(cluster.world_size) if request.offloads("param") else 0
    return Seconds(
        compute=flops / (cluster.flops * 1e12),
        communication=cluster.seconds_to_gather(traffic.total),
        host_copies=copied / (cluster.host_bandwidth * 1e9),
    )


def cut_seconds(request: Request, before: ModelShape, after: ModelShape, sent: int) -> float:
    """What the busiest rank sends, and solves for a refit; under offload also its weights to the GPU and back."""
    cluster = request.cluster
    copied = 2 * before.linear_numel() * request.element_size / cluster.world_size if request.offloads("param") else 0
    solving = options.refit_flops(request, before, after) / (cluster.flops64 * 1e12)
    return cluster.seconds_to_receive(sent) + copied / (cluster.host_bandwidth * 1e9) + solving
