"""The plan of a run as a table, and in one line."""

from collections.abc import Iterable

from loraprune_ds.files import JsonObject
from loraprune_ds.model.frozen import describe_dtype
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.plan import Plan
from loraprune_ds.plan.stages import Terms


def verdict(plan: Plan) -> str:
    """Says in one line whether the run fits."""
    cluster = plan.request.cluster
    fits = "fits" if plan.fits else "does not fit"
    device = f"{_gib(plan.device_bytes)} of {_gib(cluster.gpu_bytes)} GiB per GPU ({plan.peak_stage.name})"
    host = f"{_gib(plan.host_bytes)} of {_gib(cluster.host_bytes)} GiB of host memory per node"
    return f"{plan.request.model} {fits} on {cluster.world_size} GPUs of {cluster.gpu_memory:g} GiB: {device}, {host}"


def plan_table(plan: Plan, facts: JsonObject) -> str:
    """Lays out the `facts` of `plan_json`."""
    lines = _head_lines(plan, facts)
    lines += ["", *_memory_rows(facts["stages"])]
    lines += ["", *_total_rows(facts, steps_known=plan.request.steps_known)]
    lines += ["", verdict(plan)]
    lines += [f"note: {note}" for note in facts["notes"]]
    lines += ["", option_table(facts["options"])]
    return "\n".join(lines)


def option_table(options: Iterable[JsonObject]) -> str:
    """Lays out plans of other settings, or on other GPUs."""
    rows = [f"{'GiB':>8}{'GPUs':>8}{'peak':>8}  settings"]
    for option in options:
        gpus = option["gpus"] if option["fits"] else "none"
        overrides = " ".join(f"--set {override}" for override in option["overrides"])
        settings = overrides or "as it is"
        peak = _gib(option["device_bytes"])
        rows.append(f"{option['gpu_memory']:>8g}{gpus:>8}{peak:>8}  {settings}")
    return "\n".join(rows)


def _head_lines(plan: Plan, facts: JsonObject) -> list[str]:
    """Describes the model, the cluster, the batches and the target."""
    request = plan.request
    cluster = request.cluster
    train = request.config.train
    recomputes = "on" if train.gradient_checkpointing else "off"
    tokens = train.micro_batch_size * request.config.data.window
    lines = [
        f"{request.model}: {facts['parameters']:,} parameters, {facts['parameters_after']:,} after the last cut",
        f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GiB, less {cluster.reserve:g} for "
        f"CUDA and gaps and {_gib(cluster.nccl_bytes)} for NCCL; {describe_dtype(request.config.model)}, "
        f"activation checkpointing {recomputes}",
        f"a pass has {tokens:,} tokens, a step {request.micro_batches} of them",
    ]
    target = facts["target"]
    amount = request.config.prune.target_amount
    if target and amount:
        reached = f"{amount.format(target['reached'])} reached by prune.ratio {facts['ratio']:.4f}"
        lines.append(f"prune.target {target['asked']}: {reached}")
    return lines


def _memory_rows(stages: list[JsonObject]) -> list[str]:
    """Returns a column per stage, with its state and its worst phase."""
    names = [stage["name"] for stage in stages]
    states = [stage["state"] for stage in stages]
    peak_phases = [stage["peak_phase"] for stage in stages]
    worst = [stage["phases"][stage["peak_phase"]] for stage in stages]
    peaks = [_gib(stage["peak"]) for stage in stages]
    hosts = [_gib(sum(stage["host"].values())) for stage in stages]
    return [
        _row("GiB per GPU", names),
        *_term_rows("", states),
        *_term_rows("+ ", worst),
        _row("peak", peaks),
        _row("  while", peak_phases),
        _row("host, per rank", hosts),
    ]


def _term_rows(sign: str, columns: list[Terms]) -> list[str]:
    """Returns a row for each term that is above 0 in some column."""
    rows: list[str] = []
    for term in _terms(columns):
        cells = (_gib(terms[term]) if term in terms else "" for terms in columns)
        rows.append(_row(sign + term, cells))
    return rows


def _terms(columns: Iterable[Terms]) -> list[str]:
    """Lists the terms above 0 in the order of the columns."""
    counts = (item for column in columns for item in column.items())
    return list(dict.fromkeys(term for term, count in counts if count))


def _total_rows(facts: JsonObject, *, steps_known: bool) -> list[str]:
    """Returns the steps and files of the whole run."""
    checkpoint = facts["disk_bytes"]["checkpoint"] / 1e9
    return [
        f"{facts['steps']:,} {'' if steps_known else 'ASSUMED '}steps, {facts['cuts']} cuts",
        f"on the shared disk: a checkpoint {checkpoint:.1f} GB",
    ]


def _row(name: str, cells: Iterable[str]) -> str:
    columns = "".join(f"{cell.replace('_', ' '):>20}" for cell in cells)
    return f"{name.replace('_', ' '):<28}{columns}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
