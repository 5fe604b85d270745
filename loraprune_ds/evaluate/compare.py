"""Results of several models side by side, as one table. They are folders of runs or JSON of launch/evaluate.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.run_folder import REPORT_FILE, STATUS_FILE, describe_method, read_status
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.zeroshot import mean_accuracy
from loraprune_ds.files import read_json
from loraprune_ds.units import aligned, format_perplexity

HEAD = ("result", "method", "parameters", "removed", "perplexity", "dense", "times", "accuracy", "dense")


@dataclass(frozen=True)
class ComparedModel:
    """Describes one pruned model, from a run or an evaluation.

    Attributes:
        name: of the file or folder it was read from.
        method: criterion and ranking, which only a run knows.
        measured_on: text and windows of the perplexities. Only models that agree in it compare.
        removed_fraction: of all parameters. None where no dense model was named.
        perplexity, dense_perplexity: None where not measured or not finite.
        accuracy, dense_accuracy: means over the zero-shot tasks `tasks`.
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


def read_results(paths: Sequence[Path]) -> list[ComparedModel]:
    """Reads all results and sorts them by what they were measured on, then by size.

    Raises:
        UserError: a path is neither the folder of a finished run nor a result of launch/evaluate.py.
    """
    models = [_read_run(path) if path.is_dir() else _read_evaluation(path) for path in paths]
    return sorted(models, key=lambda model: (model.measured_on or "", model.removed_fraction or 0.0, model.name))


def _read_run(folder: Path) -> ComparedModel:
    status = read_status(folder)
    if status is None:
        raise UserError(f"{folder / STATUS_FILE} does not exist")
    if status.state != "finished":
        raise UserError(f"{folder} holds an unfinished run ({status})")
    path = folder / REPORT_FILE
    report = read_json(path)
    try:
        config, params, perplexity = report["config"], report["params"], report["perplexity"]
        return ComparedModel(
            name=folder.name,
            method=describe_method(report),
            measured_on=_describe(
                _held_out(config["data"]), None, config["evaluate"] | {"stride": None}, config["model"]["dtype"]
            ),
            parameters=params["pruned"],
            removed_fraction=params["removed_fraction"],
            perplexity=_finite(perplexity["pruned"]),
            dense_perplexity=_finite(perplexity["dense"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error!r}") from None


def _held_out(data: dict[str, Any]) -> str:
    """Names the text that a run held out: a file, or a part of its sources."""
    if data["held_out"]:
        return data["held_out"]
    sources = [data] if isinstance(data["path"], str) else [data | _given(entry) for entry in data["path"]]
    names = [
        " ".join(source[key] for key in ("path", "name", "split") if source.get(key) and source[key] != "train")
        for source in sources
    ]
    return f"a held-out {100 * data['held_out_fraction']:g} % of {' + '.join(names)}"


def _given(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if value is not None}


def _read_evaluation(path: Path) -> ComparedModel:
    result = read_json(path)
    try:
        text, dense, tasks = result["text"], result["dense"], result["tasks"]
        on = _describe(text["name"], text["split"], result["protocol"], result["dtype"]) if text else None
        return ComparedModel(
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


def comparison_table(models: Sequence[ComparedModel]) -> str:
    """Builds plain text with a block for each thing that perplexities were measured on."""
    blocks = []
    for measured_on in dict.fromkeys(model.measured_on for model in models):
        rows = [_row(model) for model in models if model.measured_on == measured_on]
        title = f"perplexity on {measured_on}" if measured_on else "no perplexity"
        table = _without_empty_columns([HEAD, *rows])
        sides = "".join("<" if name in HEAD[:2] else ">" for name in table[0])
        blocks.append("\n".join([title, *aligned(table, sides)]))
    return "\n\n".join(blocks) + "\n"


def _row(model: ComparedModel) -> tuple[str, ...]:
    times = None
    if model.perplexity is not None and model.dense_perplexity is not None:
        times = model.perplexity / model.dense_perplexity
    return (
        model.name,
        model.method or "-",
        f"{model.parameters:,}",
        "-" if model.removed_fraction is None else f"{100 * model.removed_fraction:.2f} %",
        format_perplexity(model.perplexity),
        format_perplexity(model.dense_perplexity),
        format_perplexity(times),
        _format_accuracy(model.accuracy),
        _format_accuracy(model.dense_accuracy),
    )


def _format_accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _without_empty_columns(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    return list(zip(*columns, strict=True))
