"""Advice for a run that does not fit: changes, and more GPUs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.plan.cluster import MOST_GPUS, Cluster
from loraprune_ds.plan.plan import Plan, ShapedCut, make_plan, plan_stages, planned_cuts
from loraprune_ds.plan.request import Request, changed

PINNED = {"device": "cpu", "pin_memory": True}  # as the shipped configs offload
MOST_NODES = 512  # that --smallest tries without --nodes


@dataclass(frozen=True)
class Suggestion:
    """Describes a change, its `setting` on the command line, and the result."""

    change: str
    setting: str
    device_bytes: int
    host_bytes: int
    fits: bool


def suggestions(plan: Plan) -> list[Suggestion]:
    """Plans each change that saves memory alone, then all together, then more GPUs."""
    request, found = plan.request, []
    combined: dict[str, dict[str, Any]] = {}
    for change, setting, section, values in _changes(request):
        found += _try(request, change, setting, {section: values})
        combined.setdefault(section, {}).update(values)
    if len(found) > 1:
        found += _try(request, "all of the above", "", combined)
    if smallest := smallest_plan(request, request.cluster):
        where = smallest.request.cluster
        setting = f"--nodes {where.nodes} --gpus-per-node {where.gpus_per_node}"
        found.append(Suggestion("more GPUs", setting, smallest.device_bytes, smallest.host_bytes, smallest.fits))
    return found


def largest_micro_batch(plan: Plan) -> int | None:
    """Finds the largest `train.micro_batch_size` with which the run fits. Its global batch stays. None if none fits.

    A larger one has fewer passes per step. So weights are gathered less often, and the host starts fewer kernels.
    """
    batch = plan.request.config.train.global_batch_size // plan.request.world_size
    sizes, cuts = [size for size in range(1, batch + 1) if batch % size == 0], planned_cuts(plan.request)
    return next((size for size in reversed(sizes) if _fits_with(plan, size, cuts)), None)


def _fits_with(plan: Plan, micro_batch_size: int, cuts: list[ShapedCut]) -> bool:
    request = changed(plan.request, train={"micro_batch_size": micro_batch_size})
    return replace(plan, request=request, stages=plan_stages(request, *plan.passes, cuts)).fits


def smallest_plan(request: Request, largest: Cluster, most_nodes: int = MOST_NODES) -> Plan | None:
    """Finds the plan on the fewest GPUs that fit and can split the global batch.

    It tries the GPUs of one node like that of `largest`, then whole nodes.
    """
    for candidate in _splittable(request, _clusters(largest, most_nodes)):
        if candidate.held_shards(candidate.shape.held(None, candidate.element_size).values()) <= _room(candidate):
            plan = make_plan(candidate)
            if plan.fits:
                return plan
    return None


def search(request: Request, largest: Cluster, most_nodes: int) -> tuple[Plan, str]:
    """Returns the plan on the fewest GPUs. If none fits: on the most that were tried, and a line for the user."""
    if found := smallest_plan(request, largest, most_nodes):
        return found, ""
    clusters = reversed(list(_clusters(largest, most_nodes)))  # a single GPU can always split the global batch
    return make_plan(next(_splittable(request, clusters))), (
        f"{request.model} fits on no cluster of up to {most_nodes} x {largest.gpus_per_node} GPUs of "
        f"{largest.gpu_memory:g} GiB with {largest.host_memory:g} GiB of host memory per node, of those that can split "
        f"train.global_batch_size {request.config.train.global_batch_size}"
    )


def other_form(request: Request) -> Request:
    """Returns the same run with int8 weights, or without if it has them."""
    return changed(request, model={"frozen": None if request.shape.int8 else "int8"})


def _splittable(request: Request, clusters: Iterable[Cluster]) -> Iterator[Request]:
    for cluster in clusters:
        try:
            yield changed(request, cluster)
        except UserError:
            continue  # the global batch cannot be split over so many


def _room(request: Request) -> float:
    """Returns the bytes there are for a rank's weights, wherever they lie."""
    cluster = request.cluster
    return cluster.host_bytes / cluster.gpus_per_node if request.offloads("param") else cluster.gpu_bytes


def _clusters(cluster: Cluster, most_nodes: int) -> Iterator[Cluster]:
    for gpus in range(1, cluster.gpus_per_node + 1):
        yield replace(cluster, nodes=1, gpus_per_node=gpus)
    for nodes in range(2, min(most_nodes, MOST_GPUS // cluster.gpus_per_node) + 1):
        yield replace(cluster, nodes=nodes)


def _changes(request: Request) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yields (change, setting, section of the run config, its values)."""
    train = request.config.train
    if train.micro_batch_size > 1:
        yield "one sample at a time", "--set train.micro_batch_size=1", "train", {"micro_batch_size": 1}
    if not train.gradient_checkpointing:
        setting = "--set train.gradient_checkpointing=true"
        yield "activation checkpointing", setting, "train", {"gradient_checkpointing": True}
    if request.config.model.frozen is None:
        yield "int8 weights", "--set model.frozen=int8", "model", {"frozen": "int8"}
    layer = max(request.shape.layer_numel(i) for i in range(len(request.shape.layers)))
    if request.fetch_limits.max_live > layer:
        live = {"stage3_max_live_parameters": layer, "stage3_max_reuse_distance": 0}
        setting = f"stage3_max_live_parameters {layer}, stage3_max_reuse_distance 0 in the DeepSpeed JSON"
        yield "fewer gathered weights", setting, "deepspeed", live
    offload, setting = {"offload_optimizer": PINNED}, "--set deepspeed=ds_configs/zero3_offload"
    if not request.offloads("optimizer"):
        yield "optimizer on the host", f"{setting}_optimizer.json", "deepspeed", offload
    if not request.offloads("param"):
        both = offload | {"offload_param": PINNED}
        yield "optimizer and weights on the host", f"{setting}.json", "deepspeed", both


def _try(request: Request, change: str, setting: str, sections: dict[str, dict[str, Any]]) -> list[Suggestion]:
    try:
        plan = make_plan(changed(request, None, **sections))
    except UserError:
        return []  # the batch cannot be split like that
    return [Suggestion(change, setting, plan.device_bytes, plan.host_bytes, plan.fits)]
