"""The plan of a run: memory, bytes sent, seconds, and what to change."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.costs import Cost, Total, all_steps, cut_cost, step_cost, teacher_cost
from loraprune_ds.plan.request import GIB, MOST_GPUS, Cluster, Request, changed
from loraprune_ds.plan.stages import Stage, held_bytes, moment_bytes, plan_stages

MOST_NODES = 512  # that --smallest tries without --nodes
ONE, AGAIN = {"micro_batch_size": 1}, {"gradient_checkpointing": True}
PINNED = {"device": "cpu", "pin_memory": True}  # as the shipped configs offload


@dataclass(frozen=True)
class Plan:
    """Holds the memory of a run, and computes bytes sent and seconds when they are read."""

    request: Request
    after: ModelShape  # after the first cut
    final: ModelShape
    stages: list[Stage]

    @cached_property
    def step(self) -> Cost:
        """The cost of a step before the first cut that scores and measures."""
        return step_cost(self.request, self.request.shape, (True, True))

    @cached_property
    def last_step(self) -> Cost:
        return step_cost(self.request, self.final, (False, False))

    @cached_property
    def first_cut(self) -> Cost:
        return cut_cost(self.request, self.request.shape, self.after)

    @cached_property
    def teacher(self) -> Cost:
        return teacher_cost(self.request)

    @cached_property
    def in_all(self) -> Total:
        """The total of the run. Every cut counts as the first, which costs most."""
        cuts, steps = len(self.request.pruning.schedule.cut_steps()), all_steps(self.request, self.final)
        parts = zip(steps, self.first_cut.total, self.teacher.total, strict=True)
        return Total(*(step + cuts * cut + recorded for step, cut, recorded in parts))

    @property
    def checkpoint_bytes(self) -> int:
        """The most bytes of a checkpoint: LoRA with its state, weights unless the source has them, moments."""
        request, dense, measured = self.request, self.request.shape, self.request.measured_layers
        weights = held_bytes(request.held(dense)) if measured else 0
        moments = sum(moment_bytes(dense, request.world_size, measured))
        return 12 * sum(dense.lora_sizes(request.config.lora.r)) + weights + moments

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """The most that a node's ranks hold in host memory."""
        cluster, held = self.request.cluster, max(sum(stage.host.values()) for stage in self.stages)
        return cluster.gpus_per_node * (int(cluster.host_reserve * GIB) + held)

    @property
    def fits(self) -> bool:
        cluster = self.request.cluster
        return self.device_bytes <= cluster.gpu_bytes and self.host_bytes <= cluster.host_bytes


def make_plan(request: Request) -> Plan:
    """Plans the whole run."""
    cuts = request.pruning.schedule.cut_steps()
    after, final = (request.shape_at(request.pruning.schedule.target(step)) for step in (cuts[0], cuts[-1]))
    return Plan(request, after, final, plan_stages(request, after, final))


def suggestions(plan: Plan) -> list[dict[str, Any]]:
    """Plans each change that saves memory, then all together, then more GPUs."""
    request, together, plans = plan.request, dict[str, dict[str, Any]](), list[tuple[str, str, Plan]]()
    for name, setting, section, values in _changes(request):
        plans.append((name, setting, make_plan(changed(request, None, **{section: values}))))
        together.setdefault(section, {}).update(values)
    if len(plans) > 1:
        plans.append(("all of the above", "", make_plan(changed(request, None, **together))))
    smallest, reason = search(request, request.cluster, MOST_NODES)
    if not reason:
        where = smallest.request.cluster
        plans.append(("more GPUs", f"--nodes {where.nodes} --gpus-per-node {where.gpus_per_node}", smallest))
    keys = ("change", "setting", "device_bytes", "host_bytes", "fits")
    return [dict(zip(keys, (*x, plan.device_bytes, plan.host_bytes, plan.fits), strict=True)) for *x, plan in plans]


def largest_micro_batch(plan: Plan) -> int | None:
    """Finds the largest `train.micro_batch_size` that fits, which has the fewest passes per step."""
    batch = plan.request.config.train.global_batch_size // plan.request.world_size
    sizes = (size for size in range(batch, 0, -1) if batch % size == 0)
    return next((n for n in sizes if make_plan(changed(plan.request, train={"micro_batch_size": n})).fits), None)


def search(request: Request, largest: Cluster, most_nodes: int) -> tuple[Plan, str]:
    """Returns the plan on the fewest GPUs; if none fits, on the most that were tried, and a line for the user."""
    plan = None
    for tried in _splittable(request, largest, most_nodes):
        plan = make_plan(tried)
        if plan.fits:
            return plan, ""
    gpus = f"{most_nodes} x {largest.gpus_per_node} GPUs of {largest.gpu_memory:g} GiB"
    host, batch = f"{largest.host_memory:g} GiB of host memory per node", request.config.train.global_batch_size
    reason = f"{request.model} fits on no cluster of up to {gpus} with {host} that splits the global batch of {batch}"
    return plan or make_plan(request), reason


def _splittable(request: Request, cluster: Cluster, most_nodes: int) -> Iterator[Request]:
    """Yields the request on 1, 2, … GPUs of a node, then on whole nodes, where they can split the global batch."""
    most, passes = cluster.gpus_per_node, request.micro_batches * request.world_size  # of all ranks in a step
    sizes = [(1, gpus) for gpus in range(1, most + 1)]
    sizes += [(nodes, most) for nodes in range(2, min(most_nodes, MOST_GPUS // most) + 1)]
    for nodes, gpus in sizes:
        if passes % (nodes * gpus) == 0:
            try:
                yield changed(request, replace(cluster, nodes=nodes, gpus_per_node=gpus))
            except UserError:
                continue  # hpZ has no such groups


def _changes(request: Request) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Lists unused changes that save memory: (change, setting, section of the run config, its values)."""
    train, optimizer, both = request.config.train, {"offload_optimizer": PINNED}, {"offload_param": PINNED}
    layer = max(request.shape.layer_numel(i) for i in range(len(request.shape.layers)))
    live = {"stage3_max_live_parameters": layer, "stage3_max_reuse_distance": 0}
    few = ", ".join(f"{key} {value}" for key, value in live.items()) + " in the DeepSpeed JSON"
    again, int8 = "train.gradient_checkpointing", request.config.model.frozen
    away, files = not request.offloads("param"), "--set deepspeed=ds_configs/zero3_offload"
    changes: list[tuple[bool, str, str, str, dict[str, Any]]] = [
        (train.micro_batch_size > 1, "one sample at a time", "--set train.micro_batch_size=1", "train", ONE),
        (not train.gradient_checkpointing, "activation checkpointing", f"--set {again}=true", "train", AGAIN),
        (int8 is None, "int8 weights", "--set model.frozen=int8", "model", {"frozen": "int8"}),
        (request.fetch.max_live_parameters > layer, "fewer gathered weights", few, "deepspeed", live),
        (not request.offloads("optimizer"), "optimizer on the host", f"{files}_optimizer.json", "deepspeed", optimizer),
        (away, "optimizer and weights on the host", f"{files}.json", "deepspeed", optimizer | both),
    ]
    return [(name, setting, section, values) for wanted, name, setting, section, values in changes if wanted]
