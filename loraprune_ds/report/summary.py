"""Makes the table that people read when a run is over."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.run_folder import (
    KEPT_GROUPS_FILE,
    KEPT_GROUPS_PICTURE,
    METRICS_FILE,
    MODEL_FOLDER,
    REPORT_FILE,
    TENSORBOARD_FOLDER,
    TRAINING_PICTURE,
)
from loraprune_ds.units import (
    aligned,
    format_bytes,
    format_count,
    format_duration,
    format_percent,
    format_perplexity,
    read_amount,
)

RESULT_FILES = (
    (MODEL_FOLDER, "Hugging Face model, smaller, LoRA merged in"),
    (REPORT_FILE, "these numbers and more, with versions and config"),
    (KEPT_GROUPS_FILE, "the groups that every layer kept"),
    (KEPT_GROUPS_PICTURE, "the same as a picture"),
    (TRAINING_PICTURE, "loss, sparsity, speed and memory over the steps"),
    (METRICS_FILE, "every step, cut and evaluation"),
    (TENSORBOARD_FOLDER, "the same as curves, for tensorboard --logdir"),
)
SummaryRow = tuple[str, str, str, str]


def summary_table(report: dict[str, Any], folder: Path) -> str:
    """Makes the table in plain ASCII, at most 100 columns wide unless the folder's name is long.

    Args:
        report: the content of report.json.
    """
    head = ("", "dense", "pruned", "")
    rows = [head, *_parameter_rows(report), *_target_rows(report), _perplexity_row(report), *_cost_rows(report)]
    cuts, ranks = len(report["prune_steps"]), report["world_size"]
    title = f"{report['steps']} steps, {_plural(cuts, 'cut')}, {_plural(ranks, 'ZeRO-3 rank')}"
    table = aligned(rows, "<>><")
    return "\n".join([title, "", *table, "", _serving_line(report["serving"]), *_results(folder)]) + "\n"


def _serving_line(serving: dict[str, list[int]]) -> str:
    """Names the GPUs of a server that can share every layer, and the quantisation groups that fit."""
    gpus = ", ".join(map(str, serving["tensor_parallel"]))
    groups = ", ".join(map(str, serving["quantisation_groups"])) or "none"
    return f"tensor-parallel sizes that divide it: {gpus}; quantisation groups that do: {groups}"


def _parameter_rows(report: dict[str, Any]) -> list[SummaryRow]:
    params, cuts = report["params"], report["prune_steps"]
    target = f" (target {format_percent(cuts[-1]['target'])})" if cuts else ""
    linear_removed = 1 - params["linear_pruned"] / params["linear_dense"]
    return [
        (
            "parameters, whole model",
            format_count(params["dense"]),
            format_count(params["pruned"]),
            f"{format_percent(params['removed_fraction'])} removed",
        ),
        (
            "  linear layers of the decoder",
            format_count(params["linear_dense"]),
            format_count(params["linear_pruned"]),
            f"{format_percent(linear_removed)} removed{target}",
        ),
    ]


def _target_rows(report: dict[str, Any]) -> list[SummaryRow]:
    """Tells what became of a target, if there is one."""
    target = report["target"]
    if target is None:
        return []
    amount = read_amount(target["asked"], "target")
    name = "  of prune.target" if target["unit"] == "parameters" else "weights and KV cache of a server"
    return [(name, amount.format(target["dense"]), amount.format(target["reached"]), f"target {target['asked']}")]


def _perplexity_row(report: dict[str, Any]) -> SummaryRow:
    perplexity = report["perplexity"]
    after_cut = perplexity["after_last_cut"]
    return (
        "perplexity, held-out text",
        format_perplexity(perplexity["dense"]),
        format_perplexity(perplexity["pruned"]),
        "" if after_cut is None else f"{format_perplexity(after_cut)} right after the last cut",
    )


def _cost_rows(report: dict[str, Any]) -> list[SummaryRow]:
    seconds, cuts, resident = report["seconds_per_step"], report["prune_steps"], report["resident_bytes"]
    before = max(cuts[0]["weight_bytes_before"]) if cuts else None
    after = max(cuts[-1]["weight_bytes_after"]) if cuts else None
    return [
        (
            "time per step",
            "-" if seconds["before"] is None else format_duration(seconds["before"]),
            "-" if seconds["after"] is None else format_duration(seconds["after"]),
            _speed_up(seconds["before"], seconds["after"]),
        ),
        _bytes_row("weights per rank", before, after),
        _bytes_row("memory in use per rank", *(max(resident[k]) if resident[k] else None for k in ("before", "after"))),
    ]


def _bytes_row(name: str, before: int | None, after: int | None) -> SummaryRow:
    note = "" if before is None or after is None else _change(after / before - 1)
    return (name, _or_dash(before), _or_dash(after), note)


def _or_dash(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def _change(fraction: float) -> str:
    percent = format_percent(abs(fraction))
    if percent == format_percent(0):
        return "unchanged"
    return f"{percent} {'less' if fraction < 0 else 'more'}"


def _speed_up(before: float | None, after: float | None) -> str:
    if not before or not after:
        return ""
    return f"{before / after:.2f}x faster" if before >= after else f"{after / before:.2f}x slower"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _results(folder: Path) -> Iterable[str]:
    """Lists what is in the folder. The rest may be switched off or not made yet."""
    yield f"results in {folder}"
    for name, what in RESULT_FILES:
        path = folder / name
        if path.exists():
            yield f"  {name + ('/' if path.is_dir() else ''):<17} {what}"
