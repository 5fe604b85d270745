"""The plan of a run: memory, bytes sent, seconds and suggestions, as JSON."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

from loraprune_ds.config_file import apply_override, merge
from loraprune_ds.errors import UserError
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan import refits
from loraprune_ds.plan.cluster import GIB, MOST_GPUS, Cluster
from loraprune_ds.plan.costs import Cost, Total, all_steps, cut_cost, step_cost
from loraprune_ds.plan.request import Request, changed
from loraprune_ds.plan.stages import Stage, plan_stages
from loraprune_ds.pruning.target import describe_target, on_a_server

MOST_NODES = 512  # limit of --smallest without --nodes
Build = Callable[[Cluster], Request]
PINNED = {"device": "cpu", "pin_memory": True}  # as the shipped configs offload


@dataclass(frozen=True)
class Plan:
    """Holds the memory of a run. Bytes sent and seconds are computed on access."""

    request: Request
    after: ModelShape  # after the first cut
    final: ModelShape
    stages: list[Stage]

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """The costs of a dense step that scores, of a step after the last cut, and of the first cut."""
        request = self.request
        dense = request.shape
        return {
            "step": step_cost(request, dense, scores=True),
            "last_step": step_cost(request, self.final, scores=False),
            "first_cut": cut_cost(request, dense, self.after),
        }

    @cached_property
    def in_all(self) -> Total:
        """The total of the run. Every cut counts as the first, which costs most."""
        steps = all_steps(self.request, self.final)
        return steps.plus(self.costs["first_cut"].total, len(self.request.schedule.cut_steps))

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of the largest checkpoint, which is the last before the first cut or the first after it."""
        request = self.request
        shapes = (request.shape, self.after)
        lora = (12 * sum(shape.lora_numel(request.config.lora.r)) for shape in shapes)
        refitted = (refits.saved_bytes(request, shape) for shape in shapes)
        return max(map(sum, zip(lora, refitted, strict=True)))

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """The most that a node's ranks hold in host memory."""
        cluster = self.request.cluster
        most = max(sum(stage.host.values()) for stage in self.stages)
        return cluster.gpus_per_node * (int(cluster.host_reserve * GIB) + most)

    @property
    def fits(self) -> bool:
        cluster = self.request.cluster
        return self.device_bytes <= cluster.gpu_bytes and self.host_bytes <= cluster.host_bytes


def make_plan(request: Request) -> Plan:
    """Plans the whole run."""
    cuts = request.schedule.cut_steps
    after = request.shape_at(cuts[0])
    final = request.shape_at(cuts[-1])
    return Plan(request, after, final, plan_stages(request, after, final))


def suggestions(plan: Plan) -> list[JsonObject]:
    """Plans each change that saves memory, then all together, then more GPUs.

    Leaves out what a run would refuse.
    """
    request = plan.request
    rows: list[JsonObject] = []
    together: JsonObject = {}
    for change, setting, values in _changes(request):
        if smaller := _try_plan(request, **values):
            rows.append(_suggestion(change, setting, smaller))
            together = merge(together, values)
    if len(rows) > 1 and (smaller := _try_plan(request, **together)):
        rows.append(_suggestion("all of the above", "", smaller))
    smallest, reason = search(partial(changed, request), request.cluster, MOST_NODES)
    if not reason:
        cluster = smallest.request.cluster
        setting = f"--nodes {cluster.nodes} --gpus-per-node {cluster.gpus_per_node}"
        rows.append(_suggestion("more GPUs", setting, smallest))
    return rows


def _suggestion(change: str, setting: str, plan: Plan) -> JsonObject:
    return {
        "change": change,
        "setting": setting,
        "device_bytes": plan.device_bytes,
        "host_bytes": plan.host_bytes,
        "fits": plan.fits,
    }


class _Change(NamedTuple):
    change: str
    setting: str
    values: JsonObject  # settings, as keywords of `changed`


def _override(change: str, override: str) -> _Change:
    values: JsonObject = {}
    apply_override(values, override)
    return _Change(change, f"--set {override}", values)


def _changes(request: Request) -> Iterator[_Change]:
    """Yields the unused changes that save memory."""
    train = request.config.train
    if train.micro_batch_size > 1:
        yield _override("one sample at a time", "train.micro_batch_size=1")
    if not train.gradient_checkpointing:
        yield _override("activation checkpointing", "train.gradient_checkpointing=true")
    if request.taught:
        yield _override("no distillation", "train.distill_weight=0")
    if request.refits:
        yield _override("no refit", "prune.compensate=none")
    if request.config.model.frozen is None:
        yield _override("int8 weights", "model.frozen=int8")
    if request.config.model.frozen != "nf4":
        yield _override("4-bit weights", "model.frozen=nf4")
    if not request.is_local:
        yield from _deepspeed_changes(request)


def _deepspeed_changes(request: Request) -> Iterator[_Change]:
    layer = max(layer.numel for layer in request.shape.layers)
    if request.fetch.max_live_parameters > layer:
        limits = {"stage3_max_live_parameters": layer, "stage3_max_reuse_distance": 0}
        settings = ", ".join(f"{key} {value}" for key, value in limits.items())
        setting = f"{settings} in the DeepSpeed JSON"
        yield _Change("fewer gathered weights", setting, {"deepspeed": limits})
    offload = {"offload_optimizer": PINNED}
    if not request.offloads("optimizer"):
        setting = "--set deepspeed=ds_configs/zero3_offload_optimizer.json"
        yield _Change("optimizer on the host", setting, {"deepspeed": offload})
    if not request.offloads("param"):
        setting = "--set deepspeed=ds_configs/zero3_offload.json"
        both = offload | {"offload_param": PINNED}
        yield _Change("optimizer and weights on the host", setting, {"deepspeed": both})


def largest_micro_batch(plan: Plan) -> int | None:
    """Finds the largest `train.micro_batch_size` that fits. It has the fewest passes per step."""
    batch = plan.request.config.train.global_batch_size // plan.request.world_size
    for size in range(batch, 0, -1):
        if batch % size == 0:
            larger = _try_plan(plan.request, train={"micro_batch_size": size})
            if larger and larger.fits:
                return size
    return None


def _try_plan(request: Request, **sections: JsonObject) -> Plan | None:
    """Plans a changed run. Returns None if such a run would be refused."""
    try:
        return make_plan(changed(request, None, **sections))
    except UserError:
        return None


def search(build: Build, largest: Cluster, most_nodes: int) -> tuple[Plan, str]:
    """Tries 1, 2, … GPUs of a node, then whole nodes.

    Returns the plan on the fewest GPUs that fit, or on the most that were tried, and a line for the user.

    Args:
        build: builds the request for a cluster. It raises UserError where a run would, as for a global batch that such
            ranks cannot split.
    """
    plan = None
    refused = None
    most = largest.gpus_per_node
    sizes = [(1, gpus) for gpus in range(1, most + 1)]
    sizes += [(nodes, most) for nodes in range(2, min(most_nodes, MOST_GPUS // most) + 1)]
    for nodes, gpus in sizes:
        try:
            plan = make_plan(build(replace(largest, nodes=nodes, gpus_per_node=gpus)))
        except UserError as error:
            refused = refused or error
            continue
        if plan.fits:
            return plan, ""
    if plan is None:
        assert refused is not None, "there is a size to try"
        raise refused
    gpus = f"{most_nodes} x {most} GPUs of {largest.gpu_memory:g} GiB"
    host = f"{largest.host_memory:g} GiB of host memory per node"
    request = plan.request
    batch = request.config.train.global_batch_size
    reason = f"{request.model} fits on no cluster of up to {gpus} with {host} that splits the global batch of {batch}"
    return plan, reason


def plan_json(plan: Plan, server_gib: float | None = None) -> JsonObject:
    """Returns bytes, seconds and counts. `server_gib` adds a server with that memory for weights and KV cache."""
    request = plan.request
    prune = request.config.prune
    schedule = request.schedule
    stages = [
        asdict(stage) | {"peak": stage.peak, "peak_phase": stage.peak_phase}
        for stage in plan.stages
    ]
    sizes = [
        {"size": size, "step": step, "parameters": request.shape_at(step).total_numel()}
        for step, size in schedule.ends().items()
    ]
    serving: list[JsonObject] = []
    if server_gib:
        for name, shape in (("dense", request.shape), ("pruned", plan.final)):
            serving.append({"model": name} | on_a_server(prune, shape, server_gib * GIB))
    return {
        "model": request.model,
        "parameters": request.shape.total_numel(),
        "parameters_after": plan.final.total_numel(),
        "fits": plan.fits,
        "world_size": request.world_size,
        "device_bytes": plan.device_bytes,
        "device_bytes_available": request.cluster.gpu_bytes,
        "host_bytes_per_node": plan.host_bytes,
        "host_bytes_available": request.cluster.host_bytes,
        "stages": stages,
        "costs": {name: asdict(cost) | cost.total._asdict() for name, cost in plan.costs.items()},
        "in_all": plan.in_all._asdict(),
        "disk_bytes": {"checkpoint": plan.checkpoint_bytes},
        "steps": schedule.steps,
        "cuts": len(schedule.cut_steps),
        "ratio": schedule.ratio,
        "target": describe_target(prune, request.shape, plan.final),
        "sizes": sizes,
        "serving": serving,
        "notes": notes(plan),
        "cluster": asdict(request.cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
        "suggestions": [] if plan.fits else suggestions(plan),
        "largest_micro_batch": largest_micro_batch(plan) if plan.fits else None,
    }


def notes(plan: Plan) -> list[str]:
    request = plan.request
    lines = [request.config.recipe]
    if not request.steps_known:
        options = "--samples N, or --set train.epochs=null --set train.steps=N"
        lines.append(f"the run counts epochs of absent data, so its steps are assumed ({options})")
    if request.config.prune.ranking != "uniform":
        lines.append("the plan of prune.ranking global removes the same from all layers")
    step = plan.costs["step"]
    shares_nodes = request.cluster.nodes > 1 and request.fetch.zero_hpz_partition_size == 1
    if shares_nodes and step.communication > step.compute:
        setting = "--set deepspeed=ds_configs/zero3_multinode_hpz.json"
        lines.append(
            f"sending takes longer than the arithmetic; {setting} keeps a copy of the weights on every node"
        )
    lines.append(
        "gathered weights and bytes sent are upper bounds; seconds are estimates, not measurements"
    )
    lines.append(
        "not counted: loading, evaluations, saving, the host's work; every sample counts as a full window"
    )
    return lines
