"""Compares results in one table, and in one picture of quality over the removed fraction.

%(prog)s runs/lora runs/magnitude pruned.json --picture comparison.png

RUN is the folder of a finished run, or the output of launch/evaluate.py --json. The latter has a removed fraction if it
was measured with --dense, or on a run.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraprune_ds.arguments import Parser
from loraprune_ds.checkpoint.layout import STATUS_FILE, read_status
from loraprune_ds.errors import UserError, require, run_command
from loraprune_ds.evaluate.result import MEASURES, mean_metric, tasks_with
from loraprune_ds.evaluate.settings import GYM
from loraprune_ds.files import JsonObject, json_text, read_json
from loraprune_ds.report import pictures
from loraprune_ds.report.pictures import Label
from loraprune_ds.report.records import REPORT_FILE, describe_method
from loraprune_ds.units import aligned, format_perplexity, or_dash

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")
LOOKS = (  # colour and marker of a method
    (pictures.BLUE, "o"),
    (pictures.VERMILION, "s"),
    (pictures.GREEN, "^"),
    (pictures.ORANGE, "D"),
    (pictures.PURPLE, "v"),
    (pictures.SKY_BLUE, "P"),
)
GREY = "#777777"
STYLE = {"axes.titlepad": 6, "axes.grid.axis": "both", "figure.constrained_layout.h_pad": 0.12}
Looks = dict[str | None, tuple[str, str]]  # by method, the same in all panels


class Value(NamedTuple):
    """Holds a measured number and the dense model's. Numbers compare only if `basis`, a line for readers, is equal."""

    value: float
    dense: float | None
    basis: str


# by the names of MEASURES, without those that are not finite
Measured = dict[str, Value]


@dataclass(frozen=True)
class ComparedModel:
    """A pruned model, from a run or an evaluation."""

    name: str  # of the file or folder it was read from
    method: str | None  # criterion and ranking of a run
    parameters: int
    removed_fraction: float | None  # of the dense model's parameters. None: not known
    measured: Measured

    @property
    def text(self) -> str:
        """Returns the text and windows of the perplexity. Empty without a perplexity."""
        return self.measured["perplexity"].basis if "perplexity" in self.measured else ""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results", metavar="RUN", nargs="+", type=Path)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw a picture too (.png, .pdf or .svg)"
    )
    return parser.parse_args()


def main() -> int:
    return run_command(lambda: compare(parse_arguments()))


def compare(arguments: argparse.Namespace) -> None:
    picture: Path | None = arguments.picture
    if picture and picture.suffix not in SUFFIXES:
        raise UserError(f"--picture {picture}: its name must end in {', '.join(SUFFIXES)}")
    models = read_results(arguments.results)
    if picture:
        draw_comparison(picture, models)
        print(f"picture: {picture}", file=sys.stderr)
    if arguments.json:
        print(json_text({"results": models}, indent=2), end="")
    else:
        print(comparison_table(models), end="")


def read_results(paths: Sequence[Path]) -> list[ComparedModel]:
    """Reads all results and sorts them by text, then by size."""
    models: list[ComparedModel] = []
    for path in paths:
        models += _read_run(path) if path.is_dir() else [_read_evaluation(path)]
    return sorted(models, key=lambda model: (model.text, model.removed_fraction or 0.0, model.name))


def _read_run(folder: Path) -> list[ComparedModel]:
    """Reads a run, and each size of its shelf."""
    status = read_status(folder)
    if status is None:
        raise UserError(f"{folder / STATUS_FILE} does not exist")
    require(status.state == "finished", f"{folder} holds an unfinished run ({status})")
    path = folder / REPORT_FILE
    report = read_json(path)
    try:
        return _models_of_run(folder.name, report)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error!r}") from None


def _models_of_run(run: str, report: JsonObject) -> list[ComparedModel]:
    config = report["config"]
    params = report["params"]
    perplexity = report["perplexity"]
    dense = perplexity["dense"]
    text = _describe(_held_out(config["data"]), config["evaluate"], config["model"]["dtype"])
    after = report.get("after") or {}
    measured = _tasks_and_answers(after, after.get("dense"))
    _add(measured, "perplexity", perplexity["pruned"], dense, text)
    method = describe_method(report)
    models = [ComparedModel(run, method, params["pruned"], params["removed_fraction"], measured)]
    for row in report["shelf"][:-1]:  # the last one is the run's model
        of_size: Measured = {}
        _add(of_size, "perplexity", row["perplexity"], dense, text)
        of_size |= _tasks_and_answers(row.get("after") or {}, None)
        name = f"{run}/{row['folder']}"
        models.append(
            ComparedModel(name, method, row["parameters"], row["removed_fraction"], of_size)
        )
    return models


def _held_out(data: JsonObject) -> str:
    """Names the text that a run held out: a file, or a part of its sources."""
    if data["held_out"]:
        return data["held_out"]
    sources = [data] if isinstance(data["path"], str) else data["path"]
    names: list[str] = []
    for source in sources:
        words = [source.get(key) for key in ("path", "name", "split")]
        names.append(" ".join(word for word in words if word and word != "train"))
    percent = 100 * data["held_out_fraction"]
    return f"a held-out {percent:g} % of {' + '.join(names)}"


def _read_evaluation(path: Path) -> ComparedModel:
    result = read_json(path)
    try:
        text = result["text"]
        dense = result["dense"]
        measured = _tasks_and_answers(result, dense)
        if text:
            name = f"{text['name']} {text['split'] or ''}".rstrip()
            basis = _describe(name, result["protocol"], result["dtype"])
            dense_perplexity = dense["perplexity"] if dense else None
            _add(measured, "perplexity", result["perplexity"], dense_perplexity, basis)
        size = result["cost"]["parameters"]
        return ComparedModel(
            path.stem, result["method"], size, result["removed_fraction"], measured
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of launch/evaluate.py --json: {error!r}") from None


def _tasks_and_answers(model: JsonObject, dense: JsonObject | None) -> Measured:
    """Returns the measures of tasks and greedy answers, from an evaluation or a run's `after`."""
    measured: Measured = {}
    if model.get("tasks"):
        tasks = model["tasks"]
        for name, metric in (("accuracy", "acc"), ("exact match", "exact_match")):
            names = [task.removeprefix(f"{GYM}:") for task in tasks_with(tasks, metric)]
            basis = ", ".join([*names, *_counts(tasks.get("settings") or {})])
            dense_mean = mean_metric(dense["tasks"], metric) if dense else None
            _add(measured, name, mean_metric(tasks, metric), dense_mean, basis)
    if model.get("answers"):
        answers = model["answers"]
        greedy = answers["greedy"]
        dense_greedy = dense["answers"]["greedy"] if dense else {}
        plan = model["answers_plan"]
        basis = f"greedy answers to {plan['name']} ({plan['sha256'][:8]}), at most {plan['max_new_tokens']} tokens"
        for key in ("ended", "repetition", "empty", "dense_perplexity"):  # older files lack `empty`
            name = key.replace("dense_", "answer ")
            _add(measured, name, greedy.get(key), dense_greedy.get(key), basis)
        closeness = answers["closeness"]
        if closeness:
            basis = f"{closeness['text']}, {closeness['predictions']:,} predictions"
            for name in ("agreement", "overlap"):
                _add(measured, name, closeness[name], None, basis)
    return measured


def _counts(settings: JsonObject) -> list[str]:
    """Describes the number of documents of tasks, where it is known and limited."""
    documents: dict[str, int] = (settings.get(GYM) or {}).get("documents", {})
    counts = [f"{count} questions" for count in sorted(set(documents.values()))]
    limit = settings.get("limit")
    return [*counts, f"limit {limit}"] if limit else counts


def _add(
    measured: Measured, name: str, value: float | None, dense: float | None, basis: str
) -> None:
    """Adds a measured number, unless it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return
    if dense is not None and not math.isfinite(dense):
        dense = None
    measured[name] = Value(value, dense, basis)


def _describe(name: str, protocol: JsonObject, dtype: str) -> str:
    most = "" if protocol["max_windows"] is None else f"first {protocol['max_windows']} "
    return f"{name}, {most}windows of {protocol['window']}, {dtype}"


def comparison_table(models: Sequence[ComparedModel]) -> str:
    """Builds plain text with a block for each text that perplexity was measured on. Empty columns are left out."""
    blocks: list[str] = []
    for text in dict.fromkeys(model.text for model in models):
        title = f"perplexity on {text}" if text else "no perplexity"
        rows = [_row(model) for model in models if model.text == text]
        blocks.append("\n".join([title, *_block(rows)]))
    return "\n\n".join(blocks) + "\n"


def _block(rows: list[dict[str, str]]) -> Iterator[str]:
    heads = [head for head in rows[0] if any(row[head] != "-" for row in rows)]
    cells = [["dense" if head.startswith("dense ") else head for head in heads]]
    for row in rows:
        cells.append([row[head] for head in heads])
    sides = ["<" if head in ("result", "method") else ">" for head in heads]
    return aligned(cells, "".join(sides))


def _row(model: ComparedModel) -> dict[str, str]:
    """Returns the cells by column."""
    removed = model.removed_fraction
    row = {
        "result": model.name,
        "method": model.method or "-",
        "parameters": f"{model.parameters:,}",
        "removed": "-" if removed is None else f"{100 * removed:.2f} %",
    }
    for name, measure in MEASURES.items():
        value, dense, _ = model.measured.get(name, (None, None, ""))
        row[name] = or_dash(value, measure.cell)
        row[f"dense {name}"] = or_dash(dense, measure.cell)
        if name == "perplexity":
            times = None if value is None or dense is None else value / dense
            row["times"] = format_perplexity(times)
    return row


def draw_comparison(path: Path, models: Sequence[ComparedModel]) -> None:
    """Draws a panel for each measure on each text or set of tasks."""
    panels = _panels(models)
    require(
        bool(panels),
        "nothing to draw: no result has a quality and a removed fraction; give launch/evaluate.py --dense",
    )
    methods = sorted({model.method for model in models}, key=str)
    looks = dict(zip(methods, cycle(LOOKS), strict=False))
    try:
        with pictures.picture(path, (8, 4.2 * len(panels)), STYLE) as figure:
            rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
            labels: list[Label] = []
            for axes, (name, basis) in zip(rows, panels, strict=True):
                labels += _draw_panel(axes, name, basis, panels[name, basis], looks)
            pictures.label_points(figure, labels, color=pictures.TEXT, fontsize=9)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path} cannot be written: {error}") from None


def _panels(models: Sequence[ComparedModel]) -> dict[tuple[str, str], list[ComparedModel]]:
    """Maps measure and basis to the models that compare by them."""
    panels: dict[tuple[str, str], list[ComparedModel]] = {}
    for name in MEASURES:
        for model in models:
            if model.removed_fraction is not None and name in model.measured:
                panels.setdefault((name, model.measured[name].basis), []).append(model)
    return panels


def _draw_panel(
    axes: "Axes", name: str, basis: str, models: list[ComparedModel], looks: Looks
) -> list[Label]:
    """Draws the curves of a measure. Returns the labels of their points."""
    labels: list[Label] = []
    for method in dict.fromkeys(model.method for model in models):
        of_method = [model for model in models if model.method == method]
        labels += _draw_method(axes, name, of_method, looks[method])
    values = [model.measured[name] for model in models]
    baselines = sorted({float(f"{v.dense:.4g}") for v in values if v.dense is not None})
    axes.plot(
        [0.0] * len(baselines),
        baselines,
        color=GREY,
        marker="_",
        ls="",
        markersize=12,
        mew=2,
        label="dense",
    )
    if name == "perplexity":
        pictures.scale_perplexity(axes, [v.value for v in values] + baselines)
    most_removed = max(x for _, _, (x, _) in labels)
    axes.set_xlim(-1.5, max(2.0, most_removed) * 1.08)
    axes.margins(y=0.14)
    measure = MEASURES[name]
    for baseline in baselines:
        axes.axhline(baseline, color=GREY, lw=0.8, ls=":", zorder=1)
        labels.append((axes, measure.label(baseline), (0.0, baseline)))
    axes.set_title(f"{name.capitalize()}: {basis}")
    axes.set_ylabel(f"{name} ({measure.better} is better)")
    axes.set_xlabel("parameters removed, % of the whole model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # inside it would hide a value
    return labels


def _draw_method(
    axes: "Axes", name: str, models: list[ComparedModel], look: tuple[str, str]
) -> list[Label]:
    """Draws the points of one method. Returns their labels."""
    removed = [100 * (model.removed_fraction or 0.0) for model in models]
    values = [model.measured[name].value for model in models]
    method = models[0].method
    # A line joins models that differ in the ratio alone, by at least half a percent point. They need no names.
    is_curve = method is not None and all(
        after - before >= 0.5 for before, after in pairwise(removed)
    )
    colour, marker = look
    axes.plot(
        removed,
        values,
        color=colour,
        marker=marker,
        ls="-" if is_curve else "",
        lw=1.2,
        label=method or "evaluated",
    )
    labels: list[Label] = []
    for model, x, y in zip(models, removed, values, strict=True):
        text = MEASURES[name].label(y)
        labels.append((axes, text if is_curve else f"{text} {model.name}", (x, y)))
    return labels
