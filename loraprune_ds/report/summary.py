"""Makes the table that users read at the end of a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint import layout
from loraprune_ds.evaluate.tasks import mean_metric, tasks_with
from loraprune_ds.units import (
    aligned,
    format_bytes,
    format_change,
    format_count,
    format_duration,
    format_percent,
    format_perplexity,
    read_amount,
)

RESULT_FILES = (
    (layout.MODEL_FOLDER, "the smaller Hugging Face model, LoRA merged"),
    (layout.REPORT_FILE, "these numbers and more, with versions and config"),
    (layout.KEPT_GROUPS_FILE, "the groups that every layer kept"),
    (layout.KEPT_GROUPS_PICTURE, "the same as a picture"),
    (layout.TRAINING_PICTURE, "loss, sparsity, speed and memory over the steps"),
    (layout.SHELF_PICTURE, "perplexity over the sizes"),
    (layout.METRICS_FILE, "every step, cut and evaluation"),
    (layout.ANSWERS_PAGE, "answers of both models, side by side"),
    (layout.EVALUATION_FILE, "answers and tasks as data"),
    (layout.TENSORBOARD_FOLDER, "the same as curves, for tensorboard --logdir"),
)
SummaryRow = tuple[str, ...]  # four cells


def summary_table(report: dict[str, Any], folder: Path) -> str:
    """Makes the table of a report.json in plain ASCII, at most 100 columns wide unless the folder's name is long."""
    head = ("", "dense", "pruned", "")
    rows = [head, *_size_rows(report), *_quality_rows(report), *_cost_rows(report)]
    cuts, ranks = len(report["prune_steps"]), report["world_size"]
    title = f"{report['steps']} steps, {_plural(cuts, 'cut')}, {_plural(ranks, 'ZeRO-3 rank')}"
    table = aligned(rows, "<>><")
    shelf = _shelf_rows(report.get("shelf") or [])
    gpus, groups = (", ".join(map(str, report["serving"][key])) for key in ("tensor_parallel", "quantisation_groups"))
    serving = f"tensor-parallel sizes that fit: {gpus}; quantisation groups that fit: {groups or 'none'}"
    return "\n".join([title, "", *table, "", *shelf, serving, *_results(folder)]) + "\n"


def _shelf_rows(shelf: list[dict[str, Any]]) -> Iterable[str]:
    """Yields a table with a line per size."""
    if not shelf:
        return
    rows = [("size", "parameters", "removed", "KV per token", "perplexity", "agreement", "model")]
    for row in shelf:
        same = row.get("agreement")
        cells = format_count(row["parameters"]), format_percent(row["removed_fraction"])
        cells += format_bytes(row["kv_bytes_per_token"]), format_perplexity(row["perplexity"])
        rows.append((row["size"], *cells, "-" if same is None else format_percent(same), f"{row['folder']}/"))
    yield from (*aligned(rows, "<>>>>><"), "")


def _size_rows(report: dict[str, Any]) -> Iterable[SummaryRow]:
    params, target, asked = report["params"], report["target"], report["params"]["linear_asked_fraction"]
    aim = "" if asked is None else f" (asked {format_percent(asked)})"
    linear_removed = 1 - params["linear_pruned"] / params["linear_dense"]
    total, linear = (
        [format_count(params[f"{prefix}{name}"]) for name in ("dense", "pruned")] for prefix in ("", "linear_")
    )
    yield ("parameters, whole model", *total, f"{format_percent(params['removed_fraction'])} removed")
    yield ("  linear layers of the decoder", *linear, f"{format_percent(linear_removed)} removed{aim}")
    if target is not None:
        amount = read_amount(target["asked"], "target")
        name = "  of prune.target" if target["unit"] == "parameters" else "weights and KV cache of a server"
        yield name, amount.format(target["dense"]), amount.format(target["reached"]), f"target {target['asked']}"


def _quality_rows(report: dict[str, Any]) -> Iterable[SummaryRow]:
    """Yields perplexity and the measurements of `evaluate.after`."""
    dense, after_cut, exported = (report["perplexity"][name] for name in ("dense", "after_last_cut", "pruned"))
    remark = "" if after_cut is None else f"{format_perplexity(after_cut)} right after the last cut"
    yield "perplexity, held-out text", format_perplexity(dense), format_perplexity(exported), remark
    pruned = report.get("after", {})
    models = [model for model in (pruned.get("dense"), pruned) if model]
    if pruned.get("tasks"):
        for metric, name in (("acc", "accuracy"), ("exact_match", "exact match of written answers")):
            means = [mean_metric(model["tasks"], metric) for model in models]
            count = len(tasks_with(pruned["tasks"], metric))
            if count:
                yield (name, *(format_percent(mean) for mean in means if mean is not None), _plural(count, "task"))
    if pruned.get("answers"):
        greedy = [model["answers"]["greedy"] for model in models]
        closeness = pruned["answers"]["closeness"]
        same = f"{format_percent(closeness['agreement'])} of tokens as the dense model" if closeness else ""
        yield ("answers that end by themselves", *(format_percent(one["ended"]) for one in greedy), same)
        yield ("  their repeated 4-grams", *(format_percent(one["repetition"]) for one in greedy), "")


def _cost_rows(report: dict[str, Any]) -> Iterable[SummaryRow]:
    seconds, cuts, resident = report["seconds_per_step"], report["prune_steps"], report["resident_bytes"]
    before = max(cuts[0]["weight_bytes_before"]) if cuts else None
    after = max(cuts[-1]["weight_bytes_after"]) if cuts else None
    used, still_used = (max(resident[key]) if resident[key] else None for key in ("before", "after"))
    for name, first, last, written, compared in (
        ("time per step", seconds["before"], seconds["after"], format_duration, _speed_up),
        ("weights per rank", before, after, format_bytes, format_change),
        ("memory in use per rank", used, still_used, format_bytes, format_change),
    ):
        cells = ("-" if value is None else written(value) for value in (first, last))
        yield (name, *cells, compared(first, last) if first and last else "")


def _speed_up(before: float, after: float) -> str:
    return f"{before / after:.2f}x faster" if before >= after else f"{after / before:.2f}x slower"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _results(folder: Path) -> Iterable[str]:
    yield f"results in {folder}"
    for name, what in RESULT_FILES:
        path = folder / name
        if path.exists():
            yield f"  {name + ('/' if path.is_dir() else ''):<17} {what}"
