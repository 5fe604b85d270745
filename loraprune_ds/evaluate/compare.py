"""Results of several models side by side, in one table: folders of runs, or JSON of launch/evaluate.py."""

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
    """A pruned model, from a run or an evaluation. None: not measured, not known, or not finite."""

    name: str  # of the file or folder it was read from
    method: str | None  # criterion and ranking of a run
    measured_on: str | None  # text and windows of the perplexities, which are comparable only if these agree
    parameters: int
    removed_fraction: float | None  # of the dense model's parameters
    perplexity: float | None
    dense_perplexity: float | None
    accuracy: float | None = None  # mean over the zero-shot tasks
    dense_accuracy: float | None = None
    tasks: tuple[str, ...] = ()


def read_results(paths: Sequence[Path]) -> list[ComparedModel]:
    """Reads all results and sorts them by text, then by size.

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
        protocol = config["evaluate"] | {"stride": None}
        return ComparedModel(
            name=folder.name,
            method=describe_method(report),
            measured_on=_describe(_held_out(config["data"]), protocol, config["model"]["dtype"]),
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
    entries = [{}] if isinstance(data["path"], str) else data["path"]
    sources = [data | {key: value for key, value in entry.items() if value is not None} for entry in entries]
    names = [
        " ".join(source[key] for key in ("path", "name", "split") if source.get(key) and source[key] != "train")
        for source in sources
    ]
    return f"a held-out {100 * data['held_out_fraction']:g} % of {' + '.join(names)}"


def _read_evaluation(path: Path) -> ComparedModel:
    result = read_json(path)
    try:
        text, dense, tasks = result["text"], result["dense"], result["tasks"]
        name = text and f"{text['name']} {text['split'] or ''}".rstrip()
        return ComparedModel(
            name=path.stem,
            method=result["method"],
            measured_on=_describe(name, result["protocol"], result["dtype"]) if name else None,
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


def _describe(name: str, protocol: dict[str, Any], dtype: str) -> str:
    most = "" if protocol["max_windows"] is None else f"first {protocol['max_windows']} "
    stride = f" every {protocol['stride']}" if protocol["stride"] else ""
    return f"{name}, {most}windows of {protocol['window']}{stride}, {dtype}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def comparison_table(models: Sequence[ComparedModel]) -> str:
    """Builds plain text with a block for each text that perplexity was measured on. Empty columns are left out."""
    blocks = []
    for measured_on in dict.fromkeys(model.measured_on for model in models):
        rows = [HEAD, *(_row(model) for model in models if model.measured_on == measured_on)]
        columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
        sides = "".join("<" if column[0] in HEAD[:2] else ">" for column in columns)
        title = f"perplexity on {measured_on}" if measured_on else "no perplexity"
        blocks.append("\n".join([title, *aligned(list(zip(*columns, strict=True)), sides)]))
    return "\n\n".join(blocks) + "\n"


def _row(model: ComparedModel) -> tuple[str, ...]:
    times = None
    if model.perplexity is not None and model.dense_perplexity is not None:
        times = model.perplexity / model.dense_perplexity
    accuracies = (model.accuracy, model.dense_accuracy)
    return (
        model.name,
        model.method or "-",
        f"{model.parameters:,}",
        "-" if model.removed_fraction is None else f"{100 * model.removed_fraction:.2f} %",
        *(format_perplexity(value) for value in (model.perplexity, model.dense_perplexity, times)),
        *("-" if value is None else f"{value:.4f}" for value in accuracies),
    )
