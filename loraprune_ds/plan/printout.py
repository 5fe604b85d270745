"""Shows a plan as JSON and as a table for people."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from loraprune_ds.model.frozen import describe_dtype
from loraprune_ds.plan.plan import Plan
from loraprune_ds.plan.request import GIB
from loraprune_ds.plan.stages import teacher_pass
from loraprune_ds.pruning.target import describe_target, on_a_server

COSTS = ("step", "last_step", "first_cut", "teacher")


def plan_json(plan: Plan, server_gib: float | None = None) -> dict[str, Any]:
    """Returns bytes, seconds and counts, for a server with `server_gib` for weights and KV cache."""
    request, cluster = plan.request, plan.request.cluster
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
        "stages": [asdict(stage) | {"peak": stage.peak, "peak_phase": stage.peak_phase} for stage in plan.stages],
        "costs": {name: asdict(getattr(plan, name)) | getattr(plan, name).total._asdict() for name in COSTS},
        "in_all": plan.in_all._asdict(),
        "disk_bytes": {"teacher": teacher_pass(request)[-1], "checkpoint": plan.checkpoint_bytes},
        "steps": request.steps,
        "cuts": len(request.pruning.schedule.cut_steps()),
        "ratio": request.pruning.schedule.ratio,
        "target": describe_target(request.config.prune, request.shape, plan.final),
        "serving": _serving(plan, server_gib),
        "notes": notes(plan),
        "cluster": asdict(cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
    }


def verdict(plan: Plan) -> str:
    """Says in one line whether the run fits."""
    cluster, fits = plan.request.cluster, "fits" if plan.fits else "does not fit"
    device = f"{_gib(plan.device_bytes)} of {_gib(cluster.gpu_bytes)} GiB per GPU ({plan.peak_stage.name})"
    host = f"{_gib(plan.host_bytes)} of {_gib(cluster.host_bytes)} GiB of host memory per node"
    return f"{plan.request.model} {fits} on {cluster.world_size} GPUs of {cluster.gpu_memory:g} GiB: {device}, {host}"


def notes(plan: Plan) -> list[str]:
    request, nodes, lines = plan.request, plan.request.cluster.nodes, list[str]()
    if not request.steps_known:
        known = "--samples N, or --set train.epochs=null --set train.steps=N"
        lines.append(f"the run counts epochs and its data is not here: its steps are assumed ({known})")
    if request.config.prune.ranking == "global":
        lines.append("prune.ranking global is planned as if it took from all layers alike")
    if plan.step.communication > plan.step.compute and nodes > 1 and request.fetch.zero_hpz_partition_size == 1:
        setting = "--set deepspeed=ds_configs/zero3_multinode_hpz.json"
        lines.append(f"sending takes longer than the arithmetic; with {setting} every node has a copy of the weights")
    lines.append("gathered weights and bytes sent are upper bounds; seconds are estimates, not measurements")
    lines.append("not counted: loading, evaluations, saving, the host's work; every sample counts as a full window")
    return lines


def plan_table(plan: Plan, server_gib: float | None = None) -> str:
    request, cluster, train = plan.request, plan.request.cluster, plan.request.config.train
    prune, tokens = request.config.prune, train.micro_batch_size * request.config.data.window
    lines = [
        f"{request.model}: {request.shape.total_numel():,} parameters, {plan.final.total_numel():,} after the last cut",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, less {cluster.reserve:g} for "
        f"CUDA and gaps and {_gib(cluster.nccl_bytes)} for NCCL; {describe_dtype(request.config.model)}, "
        f"activation checkpointing {'on' if train.gradient_checkpointing else 'off'}",
        f"a pass has {tokens:,} tokens, a step {request.micro_batches} of them",
    ]
    if (target := describe_target(prune, request.shape, plan.final)) and (amount := prune.target_amount):
        reached = f"{amount.format(target['reached'])} reached by prune.ratio {request.pruning.schedule.ratio:.4f}"
        lines.append(f"prune.target {prune.target}: {reached}")
    lines += ["", *_memory_rows(plan), "", *_cost_rows(plan), "", verdict(plan)]
    lines += [f"note: {note}" for note in notes(plan)]
    for found in _serving(plan, server_gib):
        room = f"{found['tokens']:,} tokens of KV cache" if found["tokens"] else "they do not fit"
        lines.append(f"on the server, {found['model']}: {_gib(found['weights'])} GiB of weights, {room}")
    return "\n".join(lines)


def suggestion_rows(suggestions: list[dict[str, Any]]) -> list[str]:
    sizes = [f"{'fits' if x['fits'] else 'does not fit':<13}{_gib(x['device_bytes']):>8} GiB" for x in suggestions]
    return [f"  {size}  {x['change']}: {x['setting']}" for size, x in zip(sizes, suggestions, strict=True)]


def _serving(plan: Plan, gib: float | None) -> list[dict[str, Any]]:
    models = {} if gib is None else {"dense": plan.request.shape, "pruned": plan.final}
    found = [on_a_server(plan.request.config.prune, shape, (gib or 0) * GIB) for shape in models.values()]
    return [{"model": name} | facts for name, facts in zip(models, found, strict=True)]


def _memory_rows(plan: Plan) -> list[str]:
    """Returns a column per stage, with its state and its worst phase."""
    rows = [_row("GiB per GPU", (stage.name for stage in plan.stages))]
    phases = [stage.phases[stage.peak_phase] for stage in plan.stages]
    for sign, parts in (("", [stage.state for stage in plan.stages]), ("+ ", phases)):
        for term in dict.fromkeys(term for part in parts for term in part if part[term]):
            rows.append(_row(sign + term, (_gib(part[term]) if term in part else "" for part in parts)))
    rows.append(_row("peak", (_gib(stage.peak) for stage in plan.stages)))
    rows.append(_row("  while", (stage.peak_phase for stage in plan.stages)))
    return [*rows, _row("host, per rank", (_gib(sum(stage.host.values())) for stage in plan.stages))]


def _cost_rows(plan: Plan) -> list[str]:
    """Returns a column per kind of step, for the cut and the dense model's pass, and rows for the whole run."""
    request, recorded = plan.request, teacher_pass(plan.request)[-1]
    costs = {name: getattr(plan, name) for name in COSTS if name != "teacher" or recorded}
    rows = [_row("", costs)]
    for term in dict.fromkeys(term for cost in costs.values() for term in cost.sent if cost.sent[term]):
        rows.append(_row(f"GB sent: {term}", (f"{cost.sent.get(term, 0) / 1e9:.3f}" for cost in costs.values())))
    rows.append(_row("GB of it to other nodes", (f"{cost.between_nodes / 1e9:.3f}" for cost in costs.values())))
    for name in ("compute", "communication", "host_copies"):
        rows.append(_row(f"seconds: {name}", (f"{getattr(cost, name):.3f}" for cost in costs.values())))
    for name in ("at_least", "at_most"):
        rows.append(_row(f"seconds {name}", (f"{getattr(cost.total, name):.2f}" for cost in costs.values())))
    hours = f"{plan.in_all.at_least / 3600:.1f} to {plan.in_all.at_most / 3600:.1f} hours"
    steps = f"{request.steps:,} {'' if request.steps_known else 'ASSUMED '}steps"
    steps += f", {len(request.pruning.schedule.cut_steps())} cuts"
    rows.append(f"in all: {hours}, {plan.in_all.bytes_sent / 1e9:,.0f} GB sent per rank, for {steps}")
    disk = f"a checkpoint {plan.checkpoint_bytes / 1e9:.1f} GB, the dense model's outputs {recorded / 1e9:.1f} GB"
    return [*rows, f"on the shared disk: {disk}"]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name.replace('_', ' '):<28}" + "".join(f"{cell.replace('_', ' '):>20}" for cell in cells)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
