"""The plan of a run: memory, bytes sent, seconds and suggestions, as JSON and as a table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from loraprune_ds.config_file import merge
from loraprune_ds.errors import UserError
from loraprune_ds.model.frozen import describe_dtype
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.cluster import GIB, MOST_GPUS, Cluster
from loraprune_ds.plan.costs import Cost, Total, all_steps, cut_cost, step_cost
from loraprune_ds.plan.request import Request, changed
from loraprune_ds.plan.stages import Stage, full_bytes, plan_stages
from loraprune_ds.pruning.compensate import numel_sent
from loraprune_ds.pruning.target import describe_target, on_a_server

MOST_NODES = 512  # limit of --smallest without --nodes
ONE, AGAIN = {"micro_batch_size": 1}, {"gradient_checkpointing": True}
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
        """The costs of a dense step that scores and measures, of a step after the last cut, and of the first cut."""
        request, dense = self.request, self.request.shape
        return {
            "step": step_cost(request, dense, (True, True)),
            "last_step": step_cost(request, self.final, (False, False)),
            "first_cut": cut_cost(request, dense, self.after),
        }

    @cached_property
    def in_all(self) -> Total:
        """The total of the run. Every cut counts as the first, which costs most."""
        cuts, steps = len(self.request.schedule.cut_steps), all_steps(self.request, self.final)
        return Total(
            *(
                step + cuts * cut
                for step, cut in zip(steps, self.costs["first_cut"].total, strict=True)
            )
        )

    @property
    def checkpoint_bytes(self) -> int:
        """The bytes of the largest checkpoint, which is the last before the first cut or the first after it."""
        return max(self._checkpoint_bytes(self.request.shape), self._checkpoint_bytes(self.after))

    def _checkpoint_bytes(self, shape: ModelShape) -> int:
        """Counts LoRA with its state, half of the input moments, and the refitted linears."""
        request, lora = self.request, 12 * sum(shape.lora_numel(self.request.config.lora.r))
        measured = [linear for _, linear in request.measured(shape)]
        pairs = zip(request.measured(request.shape), measured, strict=True)
        refits = full_bytes(
            request.stored_as(*(left for (_, linear), left in pairs if left.shape != linear.shape))
        )
        more_cuts = len(request.schedule.cut_steps) > (shape is not request.shape)
        return lora + refits + more_cuts * sum(4 * numel_sent(linear.inputs) for linear in measured)

    @property
    def peak_stage(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def device_bytes(self) -> int:
        return self.peak_stage.peak

    @property
    def host_bytes(self) -> int:
        """The most that a node's ranks hold in host memory."""
        cluster, most = self.request.cluster, max(sum(stage.host.values()) for stage in self.stages)
        return cluster.gpus_per_node * (int(cluster.host_reserve * GIB) + most)

    @property
    def fits(self) -> bool:
        cluster = self.request.cluster
        return self.device_bytes <= cluster.gpu_bytes and self.host_bytes <= cluster.host_bytes


def make_plan(request: Request) -> Plan:
    """Plans the whole run."""
    cuts = request.schedule.cut_steps
    after, final = request.shape_at(cuts[0]), request.shape_at(cuts[-1])
    return Plan(request, after, final, plan_stages(request, after, final))


def suggestions(plan: Plan) -> list[dict[str, Any]]:
    """Plans each change that saves memory, then all together, then more GPUs.

    Leaves out what a run would refuse.
    """
    request = plan.request
    plans = list[tuple[str, str, Plan]]()
    together = dict[str, Any]()
    for change, setting, values in _changes(request):
        if saving := _try_plan(request, **values):
            plans.append((change, setting, saving))
            together = merge(together, values)
    if len(plans) > 1 and (saving := _try_plan(request, **together)):
        plans.append(("all of the above", "", saving))
    smallest, reason = search(request, request.cluster, MOST_NODES)
    if not reason:
        where = smallest.request.cluster
        plans.append(
            ("more GPUs", f"--nodes {where.nodes} --gpus-per-node {where.gpus_per_node}", smallest)
        )
    keys = ("change", "setting", "device_bytes", "host_bytes", "fits")
    return [
        dict(zip(keys, (*x, plan.device_bytes, plan.host_bytes, plan.fits), strict=True))
        for *x, plan in plans
    ]


def _changes(request: Request) -> list[tuple[str, str, dict[str, Any]]]:
    """Lists the unused changes that save memory: (change, setting, keywords of `changed`)."""
    train, layer = request.config.train, max(layer.numel for layer in request.shape.layers)
    few = {"stage3_max_live_parameters": layer, "stage3_max_reuse_distance": 0}
    in_json = ", ".join(f"{key} {value}" for key, value in few.items()) + " in the DeepSpeed JSON"
    optimizer, files = {"offload_optimizer": PINNED}, "--set deepspeed=ds_configs/zero3_offload"
    both, on_gpu = (
        optimizer | {"offload_param": PINNED},
        {x: not request.offloads(x) for x in ("optimizer", "param")},
    )
    int8, again = request.config.model.frozen, train.gradient_checkpointing
    refits = bool(request.measured(request.shape))
    changes: list[tuple[bool, str, str, dict[str, Any]]] = [  # wanted, ...
        (
            train.micro_batch_size > 1,
            "one sample at a time",
            "--set train.micro_batch_size=1",
            {"train": ONE},
        ),
        (
            not again,
            "activation checkpointing",
            "--set train.gradient_checkpointing=true",
            {"train": AGAIN},
        ),
        (
            bool(request.taught),
            "no distillation",
            "--set train.distill_weight=0",
            {"train": {"distill_weight": 0.0}},
        ),
        (refits, "no refit", "--set prune.compensate=none", {"prune": {"compensate": "none"}}),
        (int8 is None, "int8 weights", "--set model.frozen=int8", {"model": {"frozen": "int8"}}),
        (
            request.fetch.max_live_parameters > layer,
            "fewer gathered weights",
            in_json,
            {"deepspeed": few},
        ),
        (
            on_gpu["optimizer"],
            "optimizer on the host",
            f"{files}_optimizer.json",
            {"deepspeed": optimizer},
        ),
        (
            on_gpu["param"],
            "optimizer and weights on the host",
            f"{files}.json",
            {"deepspeed": both},
        ),
    ]
    return [(change, setting, values) for wanted, change, setting, values in changes if wanted]


def largest_micro_batch(plan: Plan) -> int | None:
    """Finds the largest `train.micro_batch_size` that fits. It has the fewest passes per step."""
    batch = plan.request.config.train.global_batch_size // plan.request.world_size
    sizes = (size for size in range(batch, 0, -1) if batch % size == 0)
    tried = ((size, _try_plan(plan.request, train={"micro_batch_size": size})) for size in sizes)
    return next((size for size, larger in tried if larger and larger.fits), None)


def _try_plan(
    request: Request, cluster: Cluster | None = None, **sections: dict[str, Any]
) -> Plan | None:
    """Plans a changed run. Returns None if such a run would be refused."""
    try:
        return make_plan(changed(request, cluster, **sections))
    except UserError:
        return None


def search(request: Request, largest: Cluster, most_nodes: int) -> tuple[Plan, str]:
    """Tries 1, 2, … GPUs of a node, then whole nodes, where they can split the global batch.

    Returns the plan on the fewest GPUs that fit, or on the most that were tried, and a line for the user.
    """
    # of a step
    plan, most, passes = None, largest.gpus_per_node, request.micro_batches * request.world_size
    sizes = [(1, gpus) for gpus in range(1, most + 1)]
    sizes += [(nodes, most) for nodes in range(2, min(most_nodes, MOST_GPUS // most) + 1)]
    for nodes, gpus in sizes:
        if passes % (nodes * gpus) != 0:
            continue
        smaller = _try_plan(request, replace(largest, nodes=nodes, gpus_per_node=gpus))
        if smaller is None:
            continue  # hpZ cannot split such a node
        plan = smaller
        if plan.fits:
            return plan, ""
    gpus = f"{most_nodes} x {most} GPUs of {largest.gpu_memory:g} GiB"
    host, batch = (
        f"{largest.host_memory:g} GiB of host memory per node",
        request.config.train.global_batch_size,
    )
    reason = f"{request.model} fits on no cluster of up to {gpus} with {host} that splits the global batch of {batch}"
    return plan or make_plan(request), reason


def plan_json(plan: Plan, server_gib: float | None = None) -> dict[str, Any]:
    """Returns bytes, seconds and counts. `server_gib` adds a server with that memory for weights and KV cache."""
    request, cluster, prune = plan.request, plan.request.cluster, plan.request.config.prune
    served = [("dense", request.shape), ("pruned", plan.final)] if server_gib else []
    return {
        "model": request.model,
        "parameters": request.shape.total_numel(),
        "parameters_after": plan.final.total_numel(),
        "fits": plan.fits,
        "world_size": request.world_size,
        "device_bytes": plan.device_bytes,
        "device_bytes_available": cluster.gpu_bytes,
        "host_bytes_per_node": plan.host_bytes,
        "host_bytes_available": cluster.host_bytes,
        "stages": [
            asdict(stage) | {"peak": stage.peak, "peak_phase": stage.peak_phase}
            for stage in plan.stages
        ],
        "costs": {name: asdict(cost) | cost.total._asdict() for name, cost in plan.costs.items()},
        "in_all": plan.in_all._asdict(),
        "disk_bytes": {"checkpoint": plan.checkpoint_bytes},
        "steps": request.schedule.steps,
        "cuts": len(request.schedule.cut_steps),
        "ratio": request.schedule.ratio,
        "target": describe_target(prune, request.shape, plan.final),
        "sizes": [
            {"size": size, "step": step, "parameters": request.shape_at(step).total_numel()}
            for step, size in request.schedule.ends().items()
        ],
        "serving": [
            {"model": name} | on_a_server(prune, shape, (server_gib or 0) * GIB)
            for name, shape in served
        ],
        "notes": notes(plan),
        "cluster": asdict(cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
        "suggestions": [] if plan.fits else suggestions(plan),
        "largest_micro_batch": largest_micro_batch(plan) if plan.fits else None,
    }


def notes(plan: Plan) -> list[str]:
    request, nodes = plan.request, plan.request.cluster.nodes
    lines = [request.config.recipe]
    if not request.steps_known:
        known = "--samples N, or --set train.epochs=null --set train.steps=N"
        lines.append(f"the run counts epochs of absent data, so its steps are assumed ({known})")
    if request.config.prune.ranking != "uniform":
        lines.append("the plan of prune.ranking global removes the same from all layers")
    step, groups = plan.costs["step"], request.fetch.zero_hpz_partition_size
    if step.communication > step.compute and nodes > 1 and groups == 1:
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


def verdict(plan: Plan) -> str:
    """Says in one line whether the run fits."""
    cluster, fits = plan.request.cluster, "fits" if plan.fits else "does not fit"
    device = f"{_gib(plan.device_bytes)} of {_gib(cluster.gpu_bytes)} GiB per GPU ({plan.peak_stage.name})"
    host = f"{_gib(plan.host_bytes)} of {_gib(cluster.host_bytes)} GiB of host memory per node"
    return f"{plan.request.model} {fits} on {cluster.world_size} GPUs of {cluster.gpu_memory:g} GiB: {device}, {host}"


def plan_table(plan: Plan, facts: dict[str, Any]) -> str:
    """Lays out the `facts` of `plan_json`."""
    request, cluster, train = plan.request, plan.request.cluster, plan.request.config.train
    lines = [
        f"{request.model}: {facts['parameters']:,} parameters, {facts['parameters_after']:,} after the last cut",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, less {cluster.reserve:g} for "
        f"CUDA and gaps and {_gib(cluster.nccl_bytes)} for NCCL; {describe_dtype(request.config.model)}, "
        f"activation checkpointing {'on' if train.gradient_checkpointing else 'off'}",
        f"a pass has {train.micro_batch_size * request.config.data.window:,} tokens, a step {request.micro_batches} "
        "of them",
    ]
    if (target := facts["target"]) and (amount := request.config.prune.target_amount):
        reached = f"{amount.format(target['reached'])} reached by prune.ratio {facts['ratio']:.4f}"
        lines.append(f"prune.target {target['asked']}: {reached}")
    for row in facts["sizes"]:
        lines.append(
            f"prune.sizes {row['size']}: {row['parameters']:,} parameters at step {row['step']:,}"
        )
    lines += [
        "",
        *_memory_rows(facts["stages"]),
        "",
        *_cost_rows(facts, steps_known=request.steps_known),
    ]
    lines += ["", verdict(plan), *(f"note: {note}" for note in facts["notes"])]
    for served in facts["serving"]:
        room = f"{served['tokens']:,} tokens of KV cache" if served["tokens"] else "they do not fit"
        lines.append(
            f"on the server, {served['model']}: {_gib(served['weights'])} GiB of weights, {room}"
        )
    for x in facts["suggestions"]:
        fits = "fits" if x["fits"] else "does not fit"
        lines.append(f"  {fits:<13}{_gib(x['device_bytes']):>8} GiB  {x['change']}: {x['setting']}")
    if most := facts["largest_micro_batch"]:
        lines.append(
            f"the largest micro-batch that fits, with the same result: --set train.micro_batch_size={most}"
        )
    return "\n".join(lines)


def _memory_rows(stages: list[dict[str, Any]]) -> list[str]:
    """Returns a column per stage, with its state and its worst phase."""
    rows = [_row("GiB per GPU", (stage["name"] for stage in stages))]
    worst = [stage["phases"][stage["peak_phase"]] for stage in stages]
    for sign, parts in (("", [stage["state"] for stage in stages]), ("+ ", worst)):
        for term in dict.fromkeys(term for part in parts for term in part if part[term]):
            rows.append(
                _row(sign + term, (_gib(part[term]) if term in part else "" for part in parts))
            )
    rows.append(_row("peak", (_gib(stage["peak"]) for stage in stages)))
    rows.append(_row("  while", (stage["peak_phase"] for stage in stages)))
    return [*rows, _row("host, per rank", (_gib(sum(stage["host"].values())) for stage in stages))]


def _cost_rows(facts: dict[str, Any], *, steps_known: bool) -> list[str]:
    """Returns a column per kind of step and for the cut, and rows for the whole run."""
    costs, in_all = facts["costs"], facts["in_all"]
    rows = [_row("", costs)]
    for term in dict.fromkeys(
        term for cost in costs.values() for term, sent in cost["sent"].items() if sent
    ):
        rows.append(
            _row(
                f"GB sent: {term}",
                (f"{cost['sent'].get(term, 0) / 1e9:.3f}" for cost in costs.values()),
            )
        )
    rows.append(
        _row(
            "GB of it to other nodes",
            (f"{cost['between_nodes'] / 1e9:.3f}" for cost in costs.values()),
        )
    )
    for name in ("compute", "communication", "host_copies"):
        rows.append(_row(f"seconds: {name}", (f"{cost[name]:.3f}" for cost in costs.values())))
    for name in ("at_least", "at_most"):
        rows.append(_row(f"seconds {name}", (f"{cost[name]:.2f}" for cost in costs.values())))
    hours = f"{in_all['at_least'] / 3600:.1f} to {in_all['at_most'] / 3600:.1f} hours"
    steps = f"{facts['steps']:,} {'' if steps_known else 'ASSUMED '}steps, {facts['cuts']} cuts"
    rows.append(f"in all: {hours}, {in_all['bytes_sent'] / 1e9:,.0f} GB sent per rank, for {steps}")
    return [
        *rows,
        f"on the shared disk: a checkpoint {facts['disk_bytes']['checkpoint'] / 1e9:.1f} GB",
    ]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name.replace('_', ' '):<28}" + "".join(
        f"{cell.replace('_', ' '):>20}" for cell in cells
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
