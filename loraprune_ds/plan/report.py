"""A plan as one JSON object and as a table for people."""

from dataclasses import asdict
from typing import Any

from loraprune_ds.plan.advice import Suggestion
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.plan import Plan
from loraprune_ds.plan.request import ASSUMED_STEPS, Request
from loraprune_ds.plan.seconds import Seconds
from loraprune_ds.plan.steps import step_kind

COMMUNICATION_BOUND = 2.0  # times the arithmetic
OPTIONAL = ("weight_gradients", "input_moments")  # traffic of options that are off in most runs


def plan_json(plan: Plan, suggested: list[Suggestion]) -> dict[str, Any]:
    """Bytes, seconds and counts; `parameters` and `fits` first."""
    request = plan.request
    return {
        "model": request.model,
        "parameters": request.shape.total_numel(),
        "parameters_after": request.shape_at(request.schedule.ratio).total_numel(),
        "fits": plan.fits,
        "fits_device": plan.fits_device,
        "fits_host": plan.fits_host,
        "world_size": request.cluster.world_size,
        "device_bytes": plan.device_bytes,
        "device_bytes_available": request.cluster.gpu_bytes,
        "device_peak": {"stage": plan.peak_stage.name, "phase": plan.peak_stage.peak_phase},
        "host_bytes_per_node": plan.host_bytes,
        "host_bytes_available": request.cluster.host_bytes,
        "stages": [asdict(stage) | {"resident": stage.resident, "peak": stage.peak} for stage in plan.stages],
        "cuts": [asdict(cut) for cut in plan.cuts],
        "cuts_in_all": len(request.schedule.cut_steps()),
        "bytes_sent_per_step": {
            "before_any_cut": asdict(plan.step) | {"total": plan.step.total},
            "after_the_last": asdict(plan.last_step) | {"total": plan.last_step.total},
        },
        "seconds_per_step": {
            "before_any_cut": _seconds(plan.step_seconds),
            "after_the_last": _seconds(plan.last_step_seconds),
        },
        "steps": request.steps,
        "steps_known": request.steps_known,
        "seconds_in_all": {"hidden": plan.in_all.hidden, "exposed": plan.in_all.exposed},
        "bytes_sent_in_all": round(plan.in_all.sent),
        "checkpoint": {
            "disk_bytes": sum(plan.checkpoint.values()),
            "terms": plan.checkpoint,
            "at_once": request.config.checkpoint.keep_last + 1,
        },
        "teacher": {"disk_bytes": plan.teacher_bytes, "seconds": _seconds(plan.teacher_seconds)},
        "suggestions": [asdict(suggestion) for suggestion in suggested],
        "notes": notes(plan),
        "cluster": asdict(request.cluster),
        "config": request.config.to_dict(),
        "deepspeed": request.ds_config,
    }


def _seconds(seconds: Seconds) -> dict[str, float]:
    return asdict(seconds) | {"hidden": seconds.hidden, "exposed": seconds.exposed}


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and what does not."""
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
    """What a reader should know of this plan."""
    request, lines = plan.request, []
    if not request.steps_known:
        lines.append(
            f"the run counts epochs and its data is not here: {ASSUMED_STEPS} steps are assumed "
            "(--samples N, or --set train.epochs=null --set train.steps=N)"
        )
    if request.config.prune.ranking == "global":
        lines.append("ranking global takes from layers as they score; planned as if it took from all alike")
    lines += _heaviest_step(request)
    seconds = plan.step_seconds
    micro_batches = request.config.train.gradient_accumulation_steps(request.cluster.world_size)
    if micro_batches > 1 and seconds.communication > COMMUNICATION_BOUND * seconds.compute:
        lines.append(
            f"weights are gathered for each of {micro_batches} micro-batches of a step and that takes longer than the "
            "arithmetic: raise train.micro_batch_size as far as memory goes"
        )
    lines.append("seconds are estimates from the bandwidths and FLOP/s given, not measurements")
    return lines


def _heaviest_step(request: Request) -> list[str]:
    """That most steps cost less, where an option makes some of them dearer."""
    prune = request.config.prune
    if prune.criterion != "gradient" and prune.compensate == "none":
        return []
    kinds = [step_kind(prune, request.schedule, step) for step in range(1, request.steps + 1)]
    scored, measured = sum(kind.scores for kind in kinds), sum(kind.measures for kind in kinds)
    return [
        f"a step before any cut is shown as the dearest kind: of {request.steps} steps {scored} score and {measured} "
        "measure inputs; `in all` takes each as it is"
    ]


def plan_table(plan: Plan, suggested: list[Suggestion]) -> str:
    """Memory by term and stage, bytes, seconds, verdict."""
    request, cluster = plan.request, plan.request.cluster
    after = request.shape_at(request.schedule.ratio)
    lines = [
        f"{request.model}: {request.shape.total_numel():,} parameters, {after.total_numel():,} after the last cut",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, {request.config.model.dtype}, "
        f"micro-batch {request.config.train.micro_batch_size} x {request.config.data.window} tokens, "
        f"activation checkpointing {'on' if request.config.train.gradient_checkpointing else 'off'}",
        "",
        *_memory_rows(plan),
        "",
        *_traffic_rows(plan),
        "",
        verdict(plan),
    ]
    lines += [f"note: {note}" for note in notes(plan)]
    if suggested:
        lines += ["", "what to change:"]
        lines += [_suggestion_row(suggestion) for suggestion in suggested]
    return "\n".join(lines)


def _suggestion_row(suggestion: Suggestion) -> str:
    verdict = "fits" if suggestion.fits else "does not fit"
    how = f": {suggestion.setting}" if suggestion.setting else ""
    return f"  {verdict:<13}{_gib(suggestion.device_bytes):>8} GiB  {suggestion.change}{how}"


def _memory_rows(plan: Plan) -> list[str]:
    """The stages that matter: all but the cuts, and of these the one with the highest peak."""
    highest = max((stage for stage in plan.stages if stage.is_cut), key=lambda stage: stage.peak)
    stages = [stage for stage in plan.stages if stage is highest or not stage.is_cut]
    terms = dict.fromkeys(term for stage in stages for term in stage.state)
    rows = [f"{'GiB per GPU':<28}" + "".join(f"{stage.name:>20}" for stage in stages)]
    rows += [_row(term, [stage.state.get(term) for stage in stages]) for term in terms]
    phases = [stage.phases[stage.peak_phase] for stage in stages]
    for term in dict.fromkeys(term for phase in phases for term in phase):
        rows.append(_row(f"+ {term}", [phase.get(term) for phase in phases]))
    rows.append(_row("peak", [stage.peak for stage in stages]))
    rows.append(f"{'  while':<28}" + "".join(f"{stage.peak_phase:>20}" for stage in stages))
    rows.append(_row("host, per rank", [stage.host_peak for stage in stages]))
    return rows


def _row(name: str, values: list[int | None]) -> str:
    return f"{name.replace('_', ' '):<28}" + "".join(f"{'' if v is None else _gib(v):>20}" for v in values)


def _traffic_rows(plan: Plan) -> list[str]:
    rows = [f"{'':<28}{'before any cut':>20}{'after the last':>20}"]
    for term in ("weights", "lora_gradients", "scoring", "weight_gradients", "input_moments"):
        values = (getattr(plan.step, term), getattr(plan.last_step, term))
        if term in OPTIONAL and not any(values):
            continue
        rows.append(f"{'GB sent: ' + term.replace('_', ' '):<28}" + "".join(f"{v / 1e9:>20.3f}" for v in values))
    for name in ("compute", "communication", "host_copies"):
        values = (getattr(plan.step_seconds, name), getattr(plan.last_step_seconds, name))
        rows.append(f"{'seconds: ' + name.replace('_', ' '):<28}" + "".join(f"{v:>20.3f}" for v in values))
    spans = [f"{s.hidden:.2f} to {s.exposed:.2f}" for s in (plan.step_seconds, plan.last_step_seconds)]
    rows.append(f"{'seconds per step':<28}" + "".join(f"{span:>20}" for span in spans))
    first = plan.cuts[0]
    rows.append(
        f"first cut (step {first.step}): the busiest rank sends {first.bytes_sent / 1e6:.1f} MB, "
        f"{first.seconds:.3f} s; {len(plan.request.schedule.cut_steps())} cuts in all"
    )
    rows.append(_checkpoint_row(plan))
    if plan.teacher_bytes:
        teacher = plan.teacher_seconds
        rows.append(
            f"the uncut model's outputs: {plan.teacher_bytes / 1e9:.1f} GB on the shared disk, "
            f"{teacher.hidden:.0f} to {teacher.exposed:.0f} s before the first step"
        )
    whole, assumed = plan.in_all, "" if plan.request.steps_known else "ASSUMED "
    rest = "the cuts and the uncut model's pass" if plan.teacher_bytes else "the cuts"
    rows.append(
        f"in all: {whole.hidden / 3600:.1f} to {whole.exposed / 3600:.1f} hours, {whole.sent / 1e9:,.0f} GB sent per "
        f"rank, for {plan.request.steps:,} {assumed}steps and {rest}"
    )
    rows.append(
        "  not counted: loading, evaluations, checkpoints, host time of cuts; every sample counted as a full window"
    )
    return rows


def _checkpoint_row(plan: Plan) -> str:
    terms = ", ".join(f"{name.replace('_', ' ')} {count / 1e9:.1f}" for name, count in plan.checkpoint.items())
    return (
        f"a checkpoint: at most {sum(plan.checkpoint.values()) / 1e9:.1f} GB on the shared disk ({terms}); "
        f"{plan.request.config.checkpoint.keep_last + 1} of them while one is written"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
