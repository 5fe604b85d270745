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
from itertools import chain, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loraprune_ds.arguments import Parser
from loraprune_ds.checkpoint.layout import STATUS_FILE, read_status
from loraprune_ds.errors import UserError, require, run_command
from loraprune_ds.evaluate.result import MEASURES, mean_metric, tasks_with
from loraprune_ds.evaluate.settings import GYM
from loraprune_ds.files import json_text, read_json
from loraprune_ds.report import pictures
from loraprune_ds.report.pictures import Label
from loraprune_ds.report.records import REPORT_FILE, describe_method
from loraprune_ds.units import aligned, format_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")
COLOURS = (
    pictures.BLUE,
    pictures.VERMILION,
    pictures.GREEN,
    pictures.ORANGE,
    pictures.PURPLE,
    pictures.SKY_BLUE,
)
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"
STYLE = {"axes.titlepad": 6, "axes.grid.axis": "both", "figure.constrained_layout.h_pad": 0.12}
Styles = dict[str | None, tuple[str, str]]  # method -> colour and marker, the same in all panels


class Value(NamedTuple):
    """Holds a measured number and the dense model's. Numbers compare only if `basis`, a line for readers, is equal."""

    value: float
    dense: float | None
    basis: str


@dataclass(frozen=True)
class ComparedModel:
    """A pruned model, from a run or an evaluation."""

    name: str  # of the file or folder it was read from
    method: str | None  # criterion and ranking of a run
    parameters: int
    removed_fraction: float | None  # of the dense model's parameters. None: not known
    measured: dict[str, Value]  # by the names of MEASURES, without those that are not finite

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
    picture, known = arguments.picture, ", ".join(SUFFIXES)
    require(
        not picture or picture.suffix in SUFFIXES,
        f"--picture {picture}: its name must end in {known}",
    )
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
    models = [
        model
        for path in paths
        for model in (_read_run if path.is_dir() else _read_evaluation)(path)
    ]
    return sorted(models, key=lambda model: (model.text, model.removed_fraction or 0.0, model.name))


def _read_run(folder: Path) -> Iterator[ComparedModel]:
    """Reads a run, and each size of its shelf."""
    if (status := read_status(folder)) is None:
        raise UserError(f"{folder / STATUS_FILE} does not exist")
    require(status.state == "finished", f"{folder} holds an unfinished run ({status})")
    path = folder / REPORT_FILE
    report = read_json(path)
    try:
        config, params, perplexity = report["config"], report["params"], report["perplexity"]
        text = _describe(_held_out(config["data"]), config["evaluate"], config["model"]["dtype"])
        after = report.get("after") or {}
        measured = _tasks_and_answers(after, after.get("dense"))
        measured |= _value("perplexity", perplexity["pruned"], perplexity["dense"], text)
        method = describe_method(report)
        yield ComparedModel(
            folder.name, method, params["pruned"], params["removed_fraction"], measured
        )
        for row in report["shelf"][:-1]:  # the last one is the run's model
            of_size = _value("perplexity", row["perplexity"], perplexity["dense"], text)
            of_size |= _tasks_and_answers(row.get("after") or {}, None)
            name = f"{folder.name}/{row['folder']}"
            yield ComparedModel(name, method, row["parameters"], row["removed_fraction"], of_size)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version: {error!r}") from None


def _held_out(data: dict[str, Any]) -> str:
    """Names the text that a run held out: a file, or a part of its sources."""
    if data["held_out"]:
        return data["held_out"]
    sources = [data] if isinstance(data["path"], str) else data["path"]
    names = [
        " ".join(
            source[key]
            for key in ("path", "name", "split")
            if source.get(key) and source[key] != "train"
        )
        for source in sources
    ]
    return f"a held-out {100 * data['held_out_fraction']:g} % of {' + '.join(names)}"


def _read_evaluation(path: Path) -> Iterator[ComparedModel]:
    result = read_json(path)
    try:
        text, dense = result["text"], result["dense"]
        measured = _tasks_and_answers(result, dense)
        if text:
            name = f"{text['name']} {text['split'] or ''}".rstrip()
            basis = _describe(name, result["protocol"], result["dtype"])
            measured |= _value(
                "perplexity", result["perplexity"], dense["perplexity"] if dense else None, basis
            )
        size = result["cost"]["parameters"]
        yield ComparedModel(path.stem, result["method"], size, result["removed_fraction"], measured)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of launch/evaluate.py --json: {error!r}") from None


def _tasks_and_answers(model: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Value]:
    """Returns the measures of tasks and greedy answers, from an evaluation or a run's `after`."""
    tasks, answers, measured = model.get("tasks"), model.get("answers"), dict[str, Value]()
    if tasks:
        for name, metric in (("accuracy", "acc"), ("exact match", "exact_match")):
            means = [mean_metric(each["tasks"], metric) for each in (model, dense) if each]
            names = [task.removeprefix(f"{GYM}:") for task in tasks_with(tasks, metric)]
            basis = ", ".join([*names, *_counts(tasks.get("settings") or {})])
            measured |= _value(name, means[0], means[1] if dense else None, basis)
    if answers:
        plan = model["answers_plan"]
        basis = f"greedy answers to {plan['name']} ({plan['sha256'][:8]}), at most {plan['max_new_tokens']} tokens"
        for key in ("ended", "repetition", "empty", "dense_perplexity"):  # older files lack `empty`
            values = [each["answers"]["greedy"].get(key) for each in (model, dense) if each]
            measured |= _value(
                key.replace("dense_", "answer "), values[0], values[1] if dense else None, basis
            )
        if closeness := answers["closeness"]:
            for name in ("agreement", "overlap"):
                on = f"{closeness['text']}, {closeness['predictions']:,} predictions"
                measured |= _value(name, closeness[name], None, on)
    return measured


def _counts(settings: dict[str, Any]) -> list[str]:
    """Describes how many documents tasks had, if the number is known and limited."""
    limit, questions = settings.get("limit"), (settings.get(GYM) or {}).get("documents", {})
    return [f"{count} questions" for count in sorted(set(questions.values()))] + (
        [f"limit {limit}"] if limit else []
    )


def _value(name: str, value: float | None, dense: float | None, basis: str) -> dict[str, Value]:
    if value is None or not math.isfinite(value):
        return {}
    return {
        name: Value(value, dense if dense is not None and math.isfinite(dense) else None, basis)
    }


def _describe(name: str, protocol: dict[str, Any], dtype: str) -> str:
    most = "" if protocol["max_windows"] is None else f"first {protocol['max_windows']} "
    return f"{name}, {most}windows of {protocol['window']}, {dtype}"


def comparison_table(models: Sequence[ComparedModel]) -> str:
    """Builds plain text with a block for each text that perplexity was measured on. Empty columns are left out."""
    blocks = []
    for text in dict.fromkeys(model.text for model in models):
        rows = [_row(model) for model in models if model.text == text]
        heads = [head for head in rows[0] if any(row[head] != "-" for row in rows)]
        names = tuple("dense" if head.startswith("dense ") else head for head in heads)
        cells = [names, *(tuple(row[head] for head in heads) for row in rows)]
        sides = "".join("<" if head in ("result", "method") else ">" for head in heads)
        title = f"perplexity on {text}" if text else "no perplexity"
        blocks.append("\n".join([title, *aligned(cells, sides)]))
    return "\n\n".join(blocks) + "\n"


def _row(model: ComparedModel) -> dict[str, str]:
    """Returns the cells by column."""
    removed = "-" if model.removed_fraction is None else f"{100 * model.removed_fraction:.2f} %"
    parameters = f"{model.parameters:,}"
    row = {
        "result": model.name,
        "method": model.method or "-",
        "parameters": parameters,
        "removed": removed,
    }
    for name, measure in MEASURES.items():
        value, dense, _ = model.measured.get(name, (None, None, ""))
        row[name] = "-" if value is None else measure.cell(value)
        row[f"dense {name}"] = "-" if dense is None else measure.cell(dense)
        if name == "perplexity":
            row["times"] = (
                "-" if value is None or dense is None else format_perplexity(value / dense)
            )
    return row


def draw_comparison(path: Path, models: Sequence[ComparedModel]) -> None:
    """Draws a panel for each measure on each text or set of tasks."""
    drawable = [model for model in models if model.removed_fraction is not None]
    # measure and basis -> models that compare by it
    panels: dict[tuple[str, str], list[ComparedModel]] = {}
    for name, model in product(MEASURES, drawable):
        if name in model.measured:
            panels.setdefault((name, model.measured[name].basis), []).append(model)
    lacking = "no result has a quality and a removed fraction; give launch/evaluate.py --dense"
    require(bool(panels), f"nothing to draw: {lacking}")
    methods = sorted({model.method for model in models}, key=str)
    styles = {
        method: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, method in enumerate(methods)
    }
    try:
        with pictures.picture(path, (8, 4.2 * len(panels)), STYLE) as figure:
            rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
            labels = [
                _draw_panel(axes, *key, panels[key], styles)
                for axes, key in zip(rows, panels, strict=True)
            ]
            pictures.label_points(figure, chain(*labels), color=pictures.TEXT, fontsize=9)
    except (OSError, ValueError) as error:
        raise UserError(f"--picture {path} cannot be written: {error}") from None


def _draw_panel(
    axes: "Axes", name: str, basis: str, models: list[ComparedModel], styles: Styles
) -> list[Label]:
    """Draws the curves of a measure. Returns the labels of their points."""
    labels: list[Label] = []
    measure, all_values = MEASURES[name], [model.measured[name] for model in models]
    for method in dict.fromkeys(model.method for model in models):
        mine = [model for model in models if model.method == method]
        x = [100 * (model.removed_fraction or 0.0) for model in mine]
        y = [model.measured[name].value for model in mine]
        # A line joins models that differ in the ratio alone, by at least half a percent point. They need no names.
        is_curve = method is not None and all(
            after - before >= 0.5 for before, after in pairwise(x)
        )
        colour, marker = styles[method]
        axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            ls="-" if is_curve else "",
            lw=1.2,
            label=method or "evaluated",
        )
        ends = ["" if is_curve else f" {model.name}" for model in mine]
        labels += [
            (axes, measure.label(v) + end, (u, v)) for end, u, v in zip(ends, x, y, strict=True)
        ]
    baselines = sorted({float(f"{dense:.4g}") for _, dense, _ in all_values if dense is not None})
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
    values = [value for value, *_ in all_values] + baselines
    if name == "perplexity":
        pictures.scale_perplexity(axes, values)
    axes.set_xlim(-1.5, max(2.0, *(x for *_, (x, _) in labels)) * 1.08)
    axes.margins(y=0.14)
    for baseline in baselines:
        axes.axhline(baseline, color=GREY, lw=0.8, ls=":", zorder=1)
        labels.append((axes, measure.label(baseline), (0.0, baseline)))
    axes.set_title(f"{name.capitalize()}: {basis}")
    axes.set_ylabel(f"{name} ({measure.better} is better)")
    axes.set_xlabel("parameters removed, % of the whole model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))  # inside it would hide a value
    return labels
