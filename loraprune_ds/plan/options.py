"""Which settings, on which GPUs, let a run fit: the first of a list. README.md says what each setting costs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from loraprune_ds.errors import UserError
from loraprune_ds.files import JsonObject
from loraprune_ds.plan.cluster import MOST_GPUS, Cluster
from loraprune_ds.plan.plan import Plan, make_plan
from loraprune_ds.plan.request import Request

MOST_NODES = 512  # limit of --smallest without --nodes
CARDS = (16, 24, 40, 48, 80)  # GiB
# What costs most is outermost. The last two only take longer.
AXES = (
    ("", "deepspeed=ds_configs/zero3_offload.json"),
    ("", "train.distill_weight=0"),
    ("", "prune.compensate=none"),
    ("", "model.frozen=int8", "model.frozen=nf4"),
    ("", "train.gradient_checkpointing=true"),
    ("", "train.micro_batch_size=1"),
)
Overrides = Sequence[str]  # as `--set` gives them
Point = tuple[Cluster, Overrides]
Build = Callable[[Cluster, Overrides], Request]  # raises UserError where a run would


def first_that_fits(build: Build, points: Iterable[Point]) -> Plan:
    """Returns the first plan that fits, or else the last one. Leaves out what a run would refuse."""
    plan = None
    refused = UserError("there is nothing to try")
    for point in points:
        try:
            plan = make_plan(build(*point))
        except UserError as error:
            refused = error
            continue
        if plan.fits:
            break
    if plan is None:
        raise refused
    return plan


def sizes(largest: Cluster, most_nodes: int, overrides: Overrides = ()) -> Iterator[Point]:
    """Yields 1, 2, … GPUs of a node, then whole nodes."""
    most = largest.gpus_per_node
    for gpus in range(1, most + 1):
        yield replace(largest, nodes=1, gpus_per_node=gpus), overrides
    for nodes in range(2, min(most_nodes, MOST_GPUS // most) + 1):
        yield replace(largest, nodes=nodes), overrides


def settings(cluster: Cluster) -> Iterator[Point]:
    """Yields all settings of AXES, the best first."""
    for overrides in product(*AXES):
        yield cluster, tuple(filter(None, overrides))


def larger_batches(request: Request) -> Iterator[Point]:
    """Yields the micro-batches that a rank's part of the batch can be split into, the largest first."""
    batch = request.config.train.global_batch_size // request.world_size
    for size in range(batch, 0, -1):
        if batch % size == 0:
            yield request.cluster, (f"train.micro_batch_size={size}",)


def options(build: Build, plan: Plan) -> list[Plan]:
    """Plans what lets a run fit, or take fewer passes if it fits."""
    request = plan.request
    cluster = request.cluster
    lists = [larger_batches(request)]
    if not plan.fits:
        lists = [settings(cluster), sizes(cluster, MOST_NODES)]
    return [first_that_fits(build, points) for points in lists]


def best_for_cards(build: Build, largest: Cluster, most_nodes: int) -> Iterator[Plan]:
    """Yields the best setting for each of CARDS, on as few of them as any setting without offload needs."""
    *_, (_, (_offload, *least)) = settings(largest)
    for memory in CARDS:
        points = sizes(replace(largest, gpu_memory=memory), most_nodes, least)
        smallest = first_that_fits(build, points)
        yield first_that_fits(build, settings(smallest.request.cluster))


def row_of(plan: Plan) -> JsonObject:
    cluster = plan.request.cluster
    return {
        "gpu_memory": cluster.gpu_memory,
        "gpus": cluster.world_size,
        "device_bytes": plan.device_bytes,
        "fits": plan.fits,
        "overrides": plan.request.overrides,
    }
