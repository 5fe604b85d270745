"""Shows a plan as JSON and as a table for people."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from loraprune_ds.model.dtypes import held_as
from loraprune_ds.plan.advice import Suggestion
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.costs import StepCost
from loraprune_ds.plan.plan import Plan
from loraprune_ds.plan.request import ASSUMED_STEPS, Request
from loraprune_ds.plan.serving import Serving
from loraprune_ds.plan.traffic import IN_GROUP, step_kinds
from loraprune_ds.pruning.target import describe_target

COMMUNICATION_BOUND = 2.0  # times the arithmetic
SECONDS = ("compute", "communication", "host", "host_copies")
OPTIONAL = (IN_GROUP, "weight_gradients", "input_moments")  # traffic of settings that are off in most runs


def plan_json(
    plan: Plan,
    suggested: list[Suggestion],
    served: Sequence[Serving] = (),
    other: Plan | None = None,
    *,
    largest: int | None = None,
) -> dict[str, Any]:
    """Returns bytes, seconds and counts. `parameters` and `fits` come first.

    Args:
        other: the same run with or without int8 weights.
        largest: the largest micro-batch that fits.
    """
    request = plan.request
    return {
        "model": request.model,
        "parameters": request.shape.total_numel(),
        "parameters_after": request.shape_at(request.schedule.ratio).total_numel(),
        "fits": plan.fits,
        "fits_device": plan.fits_device,
        "fits_host": plan.fits_host,
        "world_size": request.world_size,
        "device_bytes": plan.device_bytes,
        "device_bytes_available": request.cluster.gpu_bytes,
        "device_peak": {"stage": plan.peak_stage.name, "phase": plan.peak_stage.peak_phase},
        "nccl_bytes": request.cluster.nccl_bytes,
        "host_bytes_per_node": plan.host_bytes,
        "host_bytes_available": request.cluster.host_bytes,
        "stages": [asdict(stage) | {"resident": stage.resident, "peak": stage.peak} for stage in plan.stages],
        "cuts": [asdict(cut) for cut in plan.cuts],
        "cuts_in_all": len(request.schedule.cut_steps()),
        "bytes_sent_per_step": {
            "before_any_cut": _bytes(plan.step),
            "after_the_last": _bytes(plan.last_step),
        },
        "micro_batch": {
            "size": request.config.train.micro_batch_size,
            "largest_that_fits": largest,
            "tokens_per_pass": _tokens_per_pass(request),
            "passes_per_step": request.micro_batches,
        },
        "seconds_per_step": {"before_any_cut": _seconds(plan.step), "after_the_last": _seconds(plan.last_step)},
        "steps": request.steps,
        "steps_known": request.steps_known,
        "seconds_in_all": {"hidden": plan.in_all.hidden, "exposed": plan.in_all.exposed},
        "bytes_sent_in_all": round(plan.in_all.sent),
        "checkpoint": {
            "disk_bytes": sum(plan.checkpoint.values()),
            "terms": plan.checkpoint,
            "at_once": request.config.checkpoint.keep_last + 1,
        },
        "teacher": {"disk_bytes": plan.teacher_bytes, "seconds": _seconds(plan.teacher)},
        "ratio": request.schedule.ratio,
        "target": describe_target(request.config.prune, request.shape, request.shape_at(request.schedule.ratio)),
        "serving": [asdict(serving) for serving in served],
        "suggestions": [asdict(suggestion) for suggestion in suggested],
        "other_form": None if other is None else _brief(other),
        "notes": notes(plan),
        "cluster": asdict(request.cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
    }


def verdict(plan: Plan) -> str:
    """Says in one line whether the run fits, or what does not."""
    cluster = plan.request.cluster
    where = f"{cluster.world_size} GPUs of {cluster.gpu_memory:g} GiB"
    device = f"{_gib(plan.device_bytes)} of {_gib(cluster.gpu_bytes)} GiB per GPU"
    if not plan.fits_device:
        return f"{plan.request.model} does not fit on {where}: a rank needs {device} ({plan.peak_stage.name})"
    host = f"{_gib(plan.host_bytes)} of {_gib(cluster.host_bytes)} GiB of host memory per node"
    if not plan.fits_host:
        return f"{plan.request.model} does not fit on {where}: its ranks need {host}"
    return f"{plan.request.model} fits on {where}: {device}, {host}"


def notes(plan: Plan) -> list[str]:
    """Lists remarks on this plan."""
    request, lines = plan.request, []
    if not request.steps_known:
        lines.append(
            f"the run counts epochs and its data is not here: {ASSUMED_STEPS} steps are assumed "
            "(--samples N, or --set train.epochs=null --set train.steps=N)"
        )
    if request.config.prune.ranking == "global":
        lines.append("ranking global takes from layers as they score; planned as if it took from all alike")
    if request.config.prune.criterion == "gradient" or request.config.prune.compensate != "none":
        lines.append(_dearest_step(request))
    if (
        plan.step.communication > plan.step.compute
        and request.cluster.nodes > 1
        and request.fetch_limits.copy_ranks == 1
    ):
        lines.append(_copy_per_node(plan))
    if request.micro_batches > 1 and plan.step.communication > COMMUNICATION_BOUND * plan.step.compute:
        lines.append(
            f"weights are gathered for each of {request.micro_batches} micro-batches of a step and that takes longer "
            "than the arithmetic: raise train.micro_batch_size as far as memory goes"
        )
    lines.append("seconds are estimates from the bandwidths and FLOP/s given, not measurements")
    return lines


def plan_table(plan: Plan, suggested: list[Suggestion], other: Plan | None = None, largest: int | None = None) -> str:
    """Returns the lines of memory, bytes, seconds, verdict. `other` and `largest` as in `plan_json`."""
    request, cluster, train = plan.request, plan.request.cluster, plan.request.config.train
    after = request.shape_at(request.schedule.ratio)
    lines = [
        f"{request.model}: {request.shape.total_numel():,} parameters, {after.total_numel():,} after the last cut",
        *_target_row(request),
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, less {cluster.reserve:g} for "
        f"CUDA and gaps and {_gib(cluster.nccl_bytes)} for NCCL; {held_as(request.config.model)}, "
        f"activation checkpointing {'on' if train.gradient_checkpointing else 'off'}",
        _micro_batch_row(request, largest),
        "",
        *_memory_rows(plan),
        "",
        *_step_rows(plan),
        *_run_rows(plan),
        "",
        verdict(plan),
        *([] if other is None else [f"with {held_as(other.request.config.model)}: {verdict(other)}"]),
        *(f"note: {note}" for note in notes(plan)),
    ]
    if suggested:
        lines += ["", "what to change:", *map(_suggestion_row, suggested)]
    return "\n".join(lines)


def _brief(plan: Plan) -> dict[str, Any]:
    return {
        "held_as": held_as(plan.request.config.model),
        "fits": plan.fits,
        "world_size": plan.request.world_size,
        "device_bytes": plan.device_bytes,
        "host_bytes_per_node": plan.host_bytes,
    }


def _bytes(cost: StepCost) -> dict[str, int]:
    return cost.sent | {"total": sum(cost.sent.values()), "to_other_nodes": cost.between_nodes}


def _tokens_per_pass(request: Request) -> int:
    return request.config.train.micro_batch_size * request.config.data.window


def _micro_batch_row(request: Request, largest: int | None) -> str:
    """Tells the tokens of a pass, and the largest micro-batch that fits."""
    size, window = request.config.train.micro_batch_size, request.config.data.window
    now = f"a pass has {_tokens_per_pass(request):,} tokens ({size} x {window}), a step {request.micro_batches} of them"
    if largest is None:
        return now
    if largest == size:
        return f"{now}: the largest micro-batch that fits"
    passes = request.config.train.global_batch_size // (request.world_size * largest)
    better = f"--set train.micro_batch_size={largest} fits: {largest * window:,} tokens, {passes} a step"
    return f"{now}; {better}, with the same result"


def _target_row(request: Request) -> list[str]:
    """Says which ratio a target became."""
    prune, ratio = request.config.prune, request.schedule.ratio
    found, amount = describe_target(prune, request.shape, request.shape_at(ratio)), prune.target_amount
    if found is None or amount is None:
        return []
    return [f"prune.target {prune.target}: {amount.format(found['reached'])} reached by prune.ratio {ratio:.4f}"]


def _seconds(cost: StepCost) -> dict[str, float]:
    return {name: getattr(cost, name) for name in (*SECONDS, "hidden", "exposed")}


def _dearest_step(request: Request) -> str:
    """Says that most steps cost less than the one shown."""
    kinds = step_kinds(request)
    scored, measured = sum(kind.scores for kind in kinds), sum(kind.measures for kind in kinds)
    return (
        f"a step before any cut is shown as the dearest kind: of {request.steps} steps {scored} score and {measured} "
        "measure inputs; `in all` takes each as it is"
    )


def _copy_per_node(plan: Plan) -> str:
    """Says what hpZ would save and take."""
    request, per_node = plan.request, plan.request.cluster.gpus_per_node
    copy = request.shape.total_numel() * request.element_size // per_node
    return (
        f"a rank sends {plan.step.between_nodes / 1e9:.0f} GB per step to other nodes, and that takes longer than the "
        f"arithmetic; with --set deepspeed=ds_configs/zero3_multinode_hpz.json every node has a copy of the weights, "
        f"{_gib(copy)} GiB more per GPU"
    )


def _suggestion_row(suggestion: Suggestion) -> str:
    verdict = "fits" if suggestion.fits else "does not fit"
    how = f": {suggestion.setting}" if suggestion.setting else ""
    return f"  {verdict:<13}{_gib(suggestion.device_bytes):>8} GiB  {suggestion.change}{how}"


def _memory_rows(plan: Plan) -> list[str]:
    """Returns a column per stage. Of the cuts only the one with the highest peak is shown."""
    highest = max((stage for stage in plan.stages if stage.is_cut), key=lambda stage: stage.peak)
    stages = [stage for stage in plan.stages if stage is highest or not stage.is_cut]
    phases = [stage.phases[stage.peak_phase] for stage in stages]
    rows = [_row("GiB per GPU", (stage.name for stage in stages))]
    for sign, parts in (("", [stage.state for stage in stages]), ("+ ", phases)):
        for term in dict.fromkeys(term for part in parts for term in part):
            rows.append(_row(sign + term, (_gib(part[term]) if term in part else "" for part in parts)))
    return [
        *rows,
        _row("peak", (_gib(stage.peak) for stage in stages)),
        _row("  while", (stage.peak_phase for stage in stages)),
        _row("host, per rank", (_gib(stage.host_peak) for stage in stages)),
    ]


def _step_rows(plan: Plan) -> list[str]:
    steps = (plan.step, plan.last_step)
    rows = [_row("", ("before any cut", "after the last"))]
    for term in plan.step.sent:
        if term not in OPTIONAL or any(step.sent[term] for step in steps):
            rows.append(_row(f"GB sent: {term}", (f"{step.sent[term] / 1e9:.3f}" for step in steps)))
    if plan.request.cluster.nodes > 1:
        rows.append(_row("GB of it to other nodes", (f"{step.between_nodes / 1e9:.3f}" for step in steps)))
    for name in SECONDS:
        rows.append(_row(f"seconds: {name}", (f"{getattr(step, name):.3f}" for step in steps)))
    return [*rows, _row("seconds per step", (f"{step.hidden:.2f} to {step.exposed:.2f}" for step in steps))]


def _run_rows(plan: Plan) -> list[str]:
    request, first, whole = plan.request, plan.cuts[0], plan.in_all
    terms = ", ".join(f"{name.replace('_', ' ')} {count / 1e9:.1f}" for name, count in plan.checkpoint.items())
    rows = [
        f"first cut (step {first.step}): the busiest rank sends {first.bytes_sent / 1e6:.1f} MB, "
        f"{first.seconds:.3f} s; {len(request.schedule.cut_steps())} cuts in all",
        f"a checkpoint: at most {sum(plan.checkpoint.values()) / 1e9:.1f} GB on the shared disk ({terms}); "
        f"{request.config.checkpoint.keep_last + 1} of them while one is written",
    ]
    if plan.teacher_bytes:
        rows.append(
            f"the dense model's outputs: {plan.teacher_bytes / 1e9:.1f} GB on the shared disk, "
            f"{plan.teacher.hidden:.0f} to {plan.teacher.exposed:.0f} s before the first step"
        )
    assumed = "" if request.steps_known else "ASSUMED "
    rest = "the cuts and the dense model's pass" if plan.teacher_bytes else "the cuts"
    return [
        *rows,
        f"in all: {whole.hidden / 3600:.1f} to {whole.exposed / 3600:.1f} hours, {whole.sent / 1e9:,.0f} GB sent per "
        f"rank, for {request.steps:,} {assumed}steps and {rest}",
        "  not counted: loading, evaluations, checkpoints, host time of cuts; every sample counted as a full window",
    ]


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name.replace('_', ' '):<28}" + "".join(f"{cell:>20}" for cell in cells)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
