"""Bytes and seconds of a step, a cut, and the whole run.

Seconds are estimates: operations and bytes over the rates of the cluster. No kernel reaches one rate at every size.
Latencies are not counted. Some communication hides behind the arithmetic, but nobody knows how much. So a step has a
lower and an upper end.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from loraprune_ds.model import flops
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import quality
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.traffic import IN_GROUP, Passes, StepKind, cut_sent, step_kinds, step_sent


@dataclass(frozen=True)
class StepCost:
    """Holds the bytes that a rank sends, by term, and seconds.

    Attributes:
        between_nodes: the bytes of `sent` that go to ranks of other nodes.
        host: seconds in which a rank's process enters modules and starts kernels.
        host_copies: seconds of copies from host memory, under parameter offload.
    """

    sent: dict[str, int]
    between_nodes: int
    compute: float
    communication: float
    host: float
    host_copies: float

    @property
    def hidden(self) -> float:
        """Returns the seconds if everything overlaps."""
        return max(self.compute, self.communication, self.host, self.host_copies)

    @property
    def exposed(self) -> float:
        """Returns the seconds if nothing overlaps."""
        return self.compute + self.communication + self.host + self.host_copies

    @property
    def total(self) -> np.ndarray:
        """Returns the fields of a `Total`, to be added up."""
        return np.array([self.hidden, self.exposed, sum(self.sent.values())])


class Total(NamedTuple):
    """Holds the sums of `StepCost.hidden`, `StepCost.exposed`, and bytes sent."""

    hidden: float
    exposed: float
    sent: float


def step_cost(request: Request, passes: Passes, kind: StepKind) -> StepCost:
    """Returns the cost of one optimizer step."""
    cluster, shape = request.cluster, passes.shape
    tokens = request.config.train.global_batch_size * request.config.data.window / request.world_size
    operations = _flops_per_token(request, shape) * tokens
    if kind.scores:
        operations += _scoring_flops(request, shape, tokens)
    if kind.measures:
        operations += quality.measuring_flops(request, shape) * tokens
    sent = step_sent(request, passes, kind)
    return StepCost(
        sent,
        compute=operations / (cluster.flops * 1e12),
        host=request.micro_batches * passes.training.called * cluster.host_microseconds / 1e6,
        **network_cost(request, sent),
    )


def network_cost(request: Request, sent: dict[str, int]) -> dict[str, Any]:
    """Returns the fields of a `StepCost` that follow from the bytes sent."""
    cluster, group = request.cluster, request.fetch_limits.copy_ranks
    in_group = sent.get(IN_GROUP, 0)
    to_all = sum(sent.values()) - in_group
    shards = sent["weights"] / max(1, request.world_size - 1) + in_group / max(1, group - 1)
    copied = shards if request.offloads("param") else 0
    return {
        "between_nodes": cluster.between_nodes(to_all) + cluster.between_nodes(in_group, group),
        "communication": cluster.seconds_to_receive(to_all, same_for_all=True)
        + cluster.seconds_to_receive(in_group, same_for_all=True, ranks=group),
        "host_copies": copied / (cluster.host_bandwidth * 1e9),
    }


def all_steps(request: Request, dense: Passes, final: Passes) -> np.ndarray:
    """Returns the total of all steps, each by its kind.

    Steps before the first cut have the dense shape, those after the last cut the final one. Between them costs change
    in proportion to the part that is gone.
    """
    schedule, kinds, total = request.schedule, step_kinds(request), np.zeros(3)
    costs = {kind: [step_cost(request, passes, kind).total for passes in (dense, final)] for kind in set(kinds)}
    for before, kind in enumerate(kinds):
        first, last = costs[kind]
        gone = schedule.target(before) / schedule.ratio
        total += first * (1 - gone) + last * gone
    return total


def cut_cost(request: Request, before: ModelShape, after: ModelShape) -> tuple[int, float]:
    """Returns (bytes that the busiest rank sends, seconds).

    A refit adds its solving. Under offload the weights go to the GPU and back.
    """
    cluster, sent = request.cluster, cut_sent(request, before, after)
    copied = 2 * before.linear_bytes(request.element_size) / cluster.world_size if request.offloads("param") else 0
    solving = quality.refit_flops(request, before, after) / (cluster.flops64 * 1e12)
    receiving = cluster.seconds_to_receive(sent, same_for_all=False)
    return sent, receiving + copied / (cluster.host_bandwidth * 1e9) + solving


def attention_product(request: Request, shape: ModelShape) -> float:
    """Returns the operations per token of one product of attention in all layers.

    It covers half a window on average, with `eager` all of it.
    """
    return flops.attention_product(shape, request.config.data.window) / (1 if request.eager else 2)


def _flops_per_token(request: Request, shape: ModelShape) -> float:
    """Returns the operations of training per token. A multiply-add is two."""
    again = int(request.config.train.gradient_checkpointing)
    lora = flops.active_lora(shape, request.config.lora.r)
    linears = (4 + 2 * again) * flops.active_numel(shape) + (6 + 2 * again) * lora
    attention = (7 + 2 * again) * attention_product(request, shape)
    return linears + attention + 4 * shape.vocab_size * shape.hidden_size


def _scoring_flops(request: Request, shape: ModelShape, tokens: float) -> float:
    """Returns the operations of one rank for its weights.

    They form B·A. An estimate of the gradient takes twice the rank besides. The true gradient takes one more product
    with the inputs of each token. `fisher` takes three operations per token and input that a linear may lose.
    """
    criterion, rank, numel = request.config.prune.criterion, request.config.lora.r, shape.linear_numel()
    if criterion == "fisher":
        return 3 * tokens * sum(shape.inputs_per_token(i, linear) for i, linear in shape.input_linear_ids())
    per_weight = {"random": 0, "magnitude": 2 * rank, "gradient": 2 * rank}.get(criterion, 6 * rank)
    products = 2 * flops.met_numel(shape) * tokens if criterion == "gradient" else 0
    return products + per_weight * numel / request.world_size
