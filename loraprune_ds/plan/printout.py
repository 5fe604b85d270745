"""Shows a plan as JSON and as a table for people."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from loraprune_ds.model.dtypes import held_as
from loraprune_ds.plan.plan import Plan, largest_micro_batch, suggestions
from loraprune_ds.plan.request import GIB
from loraprune_ds.plan.stages import teacher_pass
from loraprune_ds.pruning.target import describe_target, on_a_server

COSTS = ("step", "last_step", "first_cut", "teacher")


def plan_json(plan: Plan, server_gib: float | None = None) -> dict[str, Any]:
    """Returns bytes, seconds and counts, also on a server with `server_gib` for weights and KV cache."""
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
        "stages": [asdict(stage) | {"peak": stage.peak, "peak_phase": stage.peak_phase} for stage in plan.stages],
        "costs": {name: asdict(getattr(plan, name)) | getattr(plan, name).total._asdict() for name in COSTS},
        "in_all": plan.in_all._asdict(),
        "disk_bytes": {"teacher": teacher_pass(request)[-1], "checkpoint": plan.checkpoint_bytes},
        "steps": request.steps,
        "cuts": len(request.pruning.schedule.cut_steps()),
        "ratio": request.pruning.schedule.ratio,
        "target": describe_target(prune, request.shape, plan.final),
        "serving": [{"model": name} | on_a_server(prune, shape, (server_gib or 0) * GIB) for name, shape in served],
        "notes": notes(plan),
        "cluster": asdict(cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
        "suggestions": [] if plan.fits else suggestions(plan),
        "largest_micro_batch": largest_micro_batch(plan) if plan.fits else None,
    }


def notes(plan: Plan) -> list[str]:
    request, nodes, lines = plan.request, plan.request.cluster.nodes, list[str]()
    if not request.steps_known:
        known = "--samples N, or --set train.epochs=null --set train.steps=N"
        lines.append(f"the run counts epochs and its data is not here: its steps are assumed ({known})")
    if request.config.prune.ranking == "global":
        lines.append("prune.ranking global is planned as if it took from all layers alike")
    if plan.step.communication > plan.step.compute and nodes > 1 and request.fetch_limits.copy_ranks == 1:
        setting = "--set deepspeed=ds_configs/zero3_multinode_hpz.json"
        lines.append(f"sending takes longer than the arithmetic; with {setting} every node has a copy of the weights")
    lines.append("gathered weights and bytes sent are upper bounds; seconds are estimates, not measurements")
    lines.append("not counted: loading, evaluations, saving, the host's work; every sample counts as a full window")
    return lines


def verdict(plan: Plan) -> str:
    """Says in one line whether the run fits."""
    cluster, fits = plan.request.cluster, "fits" if plan.fits else "does not fit"
    device = f"{_gib(plan.device_bytes)} of {_gib(cluster.gpu_bytes)} GiB per GPU ({plan.peak_stage.name})"
    host = f"{_gib(plan.host_bytes)} of {_gib(cluster.host_bytes)} GiB of host memory per node"
    return f"{plan.request.model} {fits} on {cluster.world_size} GPUs of {cluster.gpu_memory:g} GiB: {device}, {host}"


def plan_table(plan: Plan, facts: dict[str, Any]) -> str:
    """Lays out what `plan_json` returned."""
    request, cluster, train = plan.request, plan.request.cluster, plan.request.config.train
    lines = [
        f"{request.model}: {facts['parameters']:,} parameters, {facts['parameters_after']:,} after the last cut",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, less {cluster.reserve:g} for "
        f"CUDA and gaps and {_gib(cluster.nccl_bytes)} for NCCL; {held_as(request.config.model)}, "
        f"activation checkpointing {'on' if train.gradient_checkpointing else 'off'}",
        f"a pass has {train.micro_batch_size * request.config.data.window:,} tokens, a step {request.micro_batches} "
        "of them",
    ]
    if (target := facts["target"]) and (amount := request.config.prune.target_amount):
        reached = f"{amount.format(target['reached'])} reached by prune.ratio {facts['ratio']:.4f}"
        lines.append(f"prune.target {target['asked']}: {reached}")
    lines += ["", *_memory_rows(facts["stages"]), "", *_cost_rows(facts, steps_known=request.steps_known)]
    lines += ["", verdict(plan), *(f"note: {note}" for note in facts["notes"])]
    for served in facts["serving"]:
        room = f"{served['tokens']:,} tokens of KV cache" if served["tokens"] else "they do not fit"
        lines.append(f"on the server, {served['model']}: {_gib(served['weights'])} GiB of weights, {room}")
    for x in facts["suggestions"]:
        fits = "fits" if x["fits"] else "does not fit"
        lines.append(f"  {fits:<13}{_gib(x['device_bytes']):>8} GiB  {x['change']}: {x['setting']}")
    if most := facts["largest_micro_batch"]:
        lines.append(f"the largest micro-batch that fits, with the same result: --set train.micro_batch_size={most}")
    return "\n".join(lines)


def _memory_rows(stages: list[dict[str, Any]]) -> list[str]:
    """Returns a column per stage, with its state and its worst phase."""
    rows = [_row("GiB per GPU", (stage["name"] for stage in stages))]
    worst = [stage["phases"][stage["peak_phase"]] for stage in stages]
    for sign, parts in (("", [stage["state"] for stage in stages]), ("+ ", worst)):
        for term in dict.fromkeys(term for part in parts for term in part if part[term]):
            rows.append(_row(sign + term, (_gib(part[term]) if term in part else "" for part in parts)))
    rows.append(_row("peak", (_gib(stage["peak"]) for stage in stages)))
    rows.append(_row("  while", (stage["peak_phase"] for stage in stages)))
    return [*rows, _row("host, per rank", (_gib(sum(stage["host"].values())) for stage in stages))]


def _cost_rows(facts: dict[str, Any], *, steps_known: bool) -> list[str]:
    """Returns a column per kind of step, for the cut and the dense model's pass, and rows for the whole run."""
    disk, in_all = facts["disk_bytes"], facts["in_all"]
    costs = {name: cost for name, cost in facts["costs"].items() if name != "teacher" or disk["teacher"]}
    rows = [_row("", costs)]
    for term in dict.fromkeys(term for cost in costs.values() for term, sent in cost["sent"].items() if sent):
        rows.append(_row(f"GB sent: {term}", (f"{cost['sent'].get(term, 0) / 1e9:.3f}" for cost in costs.values())))
    rows.append(_row("GB of it to other nodes", (f"{cost['between_nodes'] / 1e9:.3f}" for cost in costs.values())))
    for name in ("compute", "communication", "host_copies"):
        rows.append(_row(f"seconds: {name}", (f"{cost[name]:.3f}" for cost in costs.values())))
    for name in ("at_least", "at_most"):
        rows.append(_row(f"seconds {name}", (f"{cost[name]:.2f}" for cost in costs.values())))
    hours = f"{in_all['at_least'] / 3600:.1f} to {in_all['at_most'] / 3600:.1f} hours"
    steps = f"{facts['steps']:,} {'' if steps_known else 'ASSUMED '}steps, {facts['cuts']} cuts"
    rows.append(f"in all: {hours}, {in_all['bytes_sent'] / 1e9:,.0f} GB sent per rank, for {steps}")
    sizes = f"a checkpoint {disk['checkpoint'] / 1e9:.1f} GB, the dense model's outputs {disk['teacher'] / 1e9:.1f} GB"
    return [*rows, f"on the shared disk: {sizes}"]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name.replace('_', ' '):<28}" + "".join(f"{cell.replace('_', ' '):>20}" for cell in cells)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
