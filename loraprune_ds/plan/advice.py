"""What to change when a run does not fit, and the fewest GPUs on which it does."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.plan.cluster import MOST_GPUS, Cluster
from loraprune_ds.plan.plan import Plan, make_plan
from loraprune_ds.plan.request import Request, changed
from loraprune_ds.zero.ds_config import FetchLimits

PINNED = {"device": "cpu", "pin_memory": True}  # as the shipped configs offload
MOST_NODES = 512  # that --smallest tries if it is not told how many there are


@dataclass(frozen=True)
class Suggestion:
    """A change, how it is written, and what it leads to."""

    change: str
    setting: str
    device_bytes: int
    host_bytes: int
    fits: bool


def suggestions(plan: Plan) -> list[Suggestion]:
    """Changes that lower what a rank needs, each planned on its own, then all of the run's together."""
    request, found = plan.request, []
    for change, setting, sections in _changes(request):
        found += _try(request, change, setting, sections)
    combined: dict[str, Any] = {}
    for _, _, sections in _changes(request):
        for section, values in sections.items():
            combined.setdefault(section, {}).update(values)
    if len(found) > 1:
        found += _try(request, "all of the above", "", combined)
    if smallest := smallest_plan(request, request.cluster):
        where = smallest.request.cluster
        setting = f"--nodes {where.nodes} --gpus-per-node {where.gpus_per_node}"
        found.append(_suggestion("more GPUs", setting, smallest))
    return found


def smallest_plan(request: Request, largest: Cluster, most_nodes: int = MOST_NODES) -> Plan | None:
    """The plan on the fewest GPUs that fit and can split the global batch; None if none does.

    Up to as many as `largest` has in one node, then whole nodes like its.
    """
    for candidate in _splittable(request, _clusters(largest, most_nodes)):
        if candidate.shape.total_numel() * candidate.element_size > _room(candidate):
            continue
        plan = make_plan(candidate)
        if plan.fits:
            return plan
    return None


def largest_plan(request: Request, largest: Cluster, most_nodes: int = MOST_NODES) -> Plan:
    """The plan on the most GPUs that `smallest_plan` tries. A single one can always split the global batch."""
    clusters = reversed(list(_clusters(largest, most_nodes)))
    return make_plan(next(_splittable(request, clusters)))


def nothing_fits(request: Request, largest: Cluster, most_nodes: int = MOST_NODES) -> str:
    """One line for when `smallest_plan` finds nothing."""
    return (
        f"{request.model} fits on no cluster of up to {most_nodes} x {largest.gpus_per_node} GPUs of "
        f"{largest.gpu_memory:g} GiB with {largest.host_memory:g} GiB of host memory per node, of those that can split "
        f"train.global_batch_size {request.config.train.global_batch_size}"
    )


def _splittable(request: Request, clusters: Iterable[Cluster]) -> Iterator[Request]:
    for cluster in clusters:
        try:
            yield changed(request, cluster)
        except UserError:
            continue  # the global batch cannot be split over so many


def _room(request: Request) -> float:
    """Bytes that the weights alone must be below, wherever they lie."""
    cluster = request.cluster
    return cluster.host_bytes * cluster.nodes if request.offloads("param") else cluster.gpu_bytes * cluster.world_size


def _clusters(cluster: Cluster, most_nodes: int) -> Iterator[Cluster]:
    for gpus in range(1, cluster.gpus_per_node + 1):
        yield replace(cluster, nodes=1, gpus_per_node=gpus)
    for nodes in range(2, min(most_nodes, MOST_GPUS // cluster.gpus_per_node) + 1):
        yield replace(cluster, nodes=nodes)


def _changes(request: Request) -> Iterator[tuple[str, str, dict[str, dict[str, Any]]]]:
    train = request.config.train
    if train.micro_batch_size > 1:
        yield "one sample at a time", "--set train.micro_batch_size=1", {"train": {"micro_batch_size": 1}}
    if not train.gradient_checkpointing:
        values = {"gradient_checkpointing": True}
        yield "activation checkpointing", "--set train.gradient_checkpointing=true", {"train": values}
    layer = max(request.shape.layer_numel(i) for i in range(len(request.shape.layers)))
    if FetchLimits.from_ds_config(request.ds_config).max_live > layer:
        live = {"stage3_max_live_parameters": layer, "stage3_max_reuse_distance": 0}
        setting = f"stage3_max_live_parameters {layer}, stage3_max_reuse_distance 0 in the DeepSpeed JSON"
        yield "fewer gathered weights", setting, {"deepspeed": live}
    if not request.offloads("optimizer"):
        offload = {"offload_optimizer": PINNED}
        yield "optimizer on the host", "--set deepspeed=ds_configs/zero3_offload_optimizer.json", {"deepspeed": offload}
    if not request.offloads("param"):
        both = {"offload_optimizer": PINNED, "offload_param": PINNED}
        yield "optimizer and weights on the host", "--set deepspeed=ds_configs/zero3_offload.json", {"deepspeed": both}


def _try(request: Request, change: str, setting: str, sections: dict[str, dict[str, Any]]) -> list[Suggestion]:
    try:
        return [_suggestion(change, setting, make_plan(changed(request, None, **sections)))]
    except UserError:
        return []  # the batch cannot be split like that


def _suggestion(change: str, setting: str, plan: Plan) -> Suggestion:
    return Suggestion(change, setting, plan.device_bytes, plan.host_bytes, plan.fits)
