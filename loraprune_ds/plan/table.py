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
    lines += ["", *_cost_rows(facts["costs"])]
    lines += _total_rows(facts, steps_known=plan.request.steps_known)
    lines += ["", verdict(plan)]
    lines += [f"note: {note}" for note in facts["notes"]]
    for served in facts["serving"]:
        room = f"{served['tokens']:,} tokens of KV cache" if served["tokens"] else "they do not fit"
        weights = _gib(served["weights"])
        lines.append(f"on the server, {served['model']}: {weights} GiB of weights, {room}")
    for row in facts["suggestions"]:
        fits = "fits" if row["fits"] else "does not fit"
        device = _gib(row["device_bytes"])
        lines.append(f"  {fits:<13}{device:>8} GiB  {row['change']}: {row['setting']}")
    if most := facts["largest_micro_batch"]:
        lines.append(
            f"the largest micro-batch that fits, with the same result: --set train.micro_batch_size={most}"
        )
    return "\n".join(lines)


def card_table(cards: Iterable[JsonObject]) -> str:
    """Lays out the rows of `best_for_cards`."""
    rows = [f"{'GiB':>8}{'GPUs':>8}{'peak':>8}  settings"]
    for card in cards:
        gpus = card["gpus"] if card["fits"] else "none"
        overrides = " ".join(f"--set {override}" for override in card["overrides"])
        settings = overrides or "as it is"
        rows.append(f"{card['gpu_memory']:>8g}{gpus:>8}{_gib(card['device_bytes']):>8}  {settings}")
    return "\n".join(rows)


def _head_lines(plan: Plan, facts: JsonObject) -> list[str]:
    """Describes the model, the cluster, the batches and the sizes."""
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
    for row in facts["sizes"]:
        lines.append(
            f"prune.sizes {row['size']}: {row['parameters']:,} parameters at step {row['step']:,}"
        )
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


def _cost_rows(costs: dict[str, JsonObject]) -> list[str]:
    """Returns a column per kind of step and for the cut."""
    columns = costs.values()
    sent = [cost["sent"] for cost in columns]
    rows = [_row("", costs)]
    for term in _terms(sent):
        sent_gb = (terms.get(term, 0) / 1e9 for terms in sent)
        rows.append(_number_row(f"GB sent: {term}", sent_gb))
    between_nodes = (cost["between_nodes"] / 1e9 for cost in columns)
    rows.append(_number_row("GB of it to other nodes", between_nodes))
    for name in ("compute", "communication", "host_copies"):
        rows.append(_number_row(f"seconds: {name}", (cost[name] for cost in columns)))
    for name in ("at_least", "at_most"):
        rows.append(_number_row(f"seconds {name}", (cost[name] for cost in columns), digits=2))
    return rows


def _total_rows(facts: JsonObject, *, steps_known: bool) -> list[str]:
    """Returns the hours, bytes and files of the whole run."""
    total = facts["in_all"]
    hours = f"{total['at_least'] / 3600:.1f} to {total['at_most'] / 3600:.1f} hours"
    steps = f"{facts['steps']:,} {'' if steps_known else 'ASSUMED '}steps, {facts['cuts']} cuts"
    checkpoint = facts["disk_bytes"]["checkpoint"] / 1e9
    return [
        f"in all: {hours}, {total['bytes_sent'] / 1e9:,.0f} GB sent per rank, for {steps}",
        f"on the shared disk: a checkpoint {checkpoint:.1f} GB",
    ]


def _number_row(name: str, numbers: Iterable[float], digits: int = 3) -> str:
    return _row(name, (f"{number:.{digits}f}" for number in numbers))


def _row(name: str, cells: Iterable[str]) -> str:
    columns = "".join(f"{cell.replace('_', ' '):>20}" for cell in cells)
    return f"{name.replace('_', ' '):<28}{columns}"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
