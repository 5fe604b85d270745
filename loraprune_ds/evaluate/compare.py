"""Several results side by side: folders of runs and JSON files of launch/evaluate.py, as one table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.run_folder import REPORT_FILE, STATUS_FILE, read_status
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.runs import read_run_report
from loraprune_ds.evaluate.zeroshot import mean_accuracy
from loraprune_ds.files import read_json
from loraprune_ds.units import aligned, format_perplexity


@dataclass(frozen=True)
class Result:
    """One pruned model, of a run or an evaluation.

    Attributes:
        name: file or folder it was read from.
        method: criterion and ranking of a run; None of another model, which does not say.
        measured_on: text and windows of the perplexities; only results that agree in it compare.
        removed_fraction: of all parameters; None where no dense model was named.
        perplexity, dense_perplexity: None where not measured or not finite.
        accuracy: mean over the zero-shot tasks `tasks`; dense likewise.
    """

    name: str
    method: str | None
    measured_on: str | None
    parameters: int
    removed_fraction: float | None
    perplexity: float | None
    dense_perplexity: float | None
    accuracy: float | None = None
    dense_accuracy: float | None = None
    tasks: tuple[str, ...] = ()


def read_results(paths: Sequence[Path]) -> list[Result]:
    """In the order of what they were measured on, then of their size.

    Raises:
        UserError: a path is neither the folder of a finished run nor a result of launch/evaluate.py.
    """
    results = [_read_run(path) if path.is_dir() else _read_evaluation(path) for path in paths]
    return sorted(results, key=lambda r: (r.measured_on or "", r.removed_fraction or 0.0, r.name))


def _read_run(folder: Path) -> Result:
    status = read_status(folder)
    if status is None:
        raise UserError(f"{folder / STATUS_FILE} does not exist")
    if status.state != "finished":
        raise UserError(f"{folder} holds an unfinished run ({status})")
    path = folder / REPORT_FILE
    report = read_json(path)
    try:
        config, params, perplexity = report["config"], report["params"], report["perplexity"]
        held_out = config["data"]["held_out"] or f"a held-out part of {config['data']['path']}"
        return Result(
            name=folder.name,
            method=read_run_report(report)[1],
            measured_on=_describe(held_out, None, config["evaluate"] | {"stride": None}, config["model"]["dtype"]),
            parameters=params["pruned"],
            removed_fraction=params["removed_fraction"],
            perplexity=_finite(perplexity["pruned"]),
            dense_perplexity=_finite(perplexity["dense"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error!r}") from None


def _read_evaluation(path: Path) -> Result:
    result = read_json(path)
    try:
        text, dense, tasks = result["text"], result["dense"], result["tasks"]
        on = _describe(text["name"], text["split"], result["protocol"], result["dtype"]) if text else None
        return Result(
            name=path.stem,
            method=result["method"],
            measured_on=on,
            parameters=result["cost"]["parameters"],
            removed_fraction=result["removed_fraction"],
            perplexity=_finite(result["perplexity"]),
            dense_perplexity=_finite(dense["perplexity"]) if dense else None,
            accuracy=mean_accuracy(tasks) if tasks else None,
            dense_accuracy=mean_accuracy(dense["tasks"]) if tasks and dense else None,
            tasks=tuple(tasks["results"]) if tasks else (),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of launch/evaluate.py --json: {error!r}") from None


def _describe(name: str, split: str | None, protocol: dict[str, Any], dtype: str) -> str:
    most = "" if protocol["max_windows"] is None else f"first {protocol['max_windows']} "
    stride = f" every {protocol['stride']}" if protocol["stride"] else ""
    return f"{name}{f' {split}' if split else ''}, {most}windows of {protocol['window']}{stride}, {dtype}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def comparison_table(results: Sequence[Result]) -> str:
    """Plain text; one block for each thing the perplexities were measured on."""
    blocks = []
    for measured_on in dict.fromkeys(result.measured_on for result in results):
        rows = [_row(result) for result in results if result.measured_on == measured_on]
        title = f"perplexity on {measured_on}" if measured_on else "no perplexity"
        table = _without_empty_columns([HEAD, *rows])
        sides = "".join("<" if name in HEAD[:2] else ">" for name in table[0])
        blocks.append("\n".join([title, *aligned(table, sides)]))
    return "\n\n".join(blocks) + "\n"


HEAD = ("result", "method", "parameters", "removed", "perplexity", "dense", "times", "accuracy", "dense")


def _row(result: Result) -> tuple[str, ...]:
    times = None
    if result.perplexity is not None and result.dense_perplexity is not None:
        times = result.perplexity / result.dense_perplexity
    return (
        result.name,
        result.method or "-",
        f"{result.parameters:,}",
        "-" if result.removed_fraction is None else f"{100 * result.removed_fraction:.2f} %",
        format_perplexity(result.perplexity),
        format_perplexity(result.dense_perplexity),
        format_perplexity(times),
        _accuracy(result.accuracy),
        _accuracy(result.dense_accuracy),
    )


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _without_empty_columns(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Less those that nobody has."""
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    return list(zip(*columns, strict=True))
