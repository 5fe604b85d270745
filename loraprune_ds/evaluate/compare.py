"""Compares pruned models in a table and a picture. They are folders of runs, or JSON of launch/evaluate.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loraprune_ds.checkpoint.layout import REPORT_FILE, STATUS_FILE, describe_method, read_status
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.drawing import (
    BLUE,
    GREEN,
    LOG_FROM,
    ORANGE,
    PLOT_STYLE,
    PURPLE,
    SKY_BLUE,
    TEXT,
    VERMILION,
    label_beside,
    make_logarithmic,
    save_picture,
)
from loraprune_ds.evaluate.zeroshot import mean_accuracy
from loraprune_ds.files import read_json
from loraprune_ds.units import aligned, format_perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = (
    *("result", "method", "parameters", "removed", "perplexity", "dense", "times", "accuracy", "dense"),
    *("repeated", "dense", "ended", "dense", "agreement", "overlap"),  # of greedy answers, and on the text
)
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE)
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"
Label = tuple[str, tuple[float, float]]  # a text and its point
Styles = dict[str | None, tuple[str, str]]  # method -> colour and marker, the same in all panels


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
    repetition: float | None = None  # of greedy answers, as `ended`
    dense_repetition: float | None = None
    ended: float | None = None
    dense_ended: float | None = None
    agreement: float | None = None  # with the dense model, as `overlap`
    overlap: float | None = None


def read_results(paths: Sequence[Path]) -> list[ComparedModel]:
    """Reads all results and sorts them by text, then by size."""
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
            **_answers(result, ""),
            **_answers(dense or {}, "dense_"),
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result of launch/evaluate.py --json: {error!r}") from None


def _answers(model: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the fields of a `ComparedModel` about answers, if this model or the dense one has written some."""
    answers = model.get("answers")
    if answers is None:
        return {}
    closeness = answers["closeness"] or {}
    return {prefix + key: answers["greedy"][key] for key in ("repetition", "ended")} | {
        key: closeness[key] for key in ("agreement", "overlap") if key in closeness
    }


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
    shares = (model.repetition, model.dense_repetition, model.ended, model.dense_ended, model.agreement)
    return (
        model.name,
        model.method or "-",
        f"{model.parameters:,}",
        "-" if model.removed_fraction is None else f"{100 * model.removed_fraction:.2f} %",
        *(format_perplexity(value) for value in (model.perplexity, model.dense_perplexity, times)),
        *("-" if value is None else f"{value:.4f}" for value in accuracies),
        *("-" if value is None else f"{100 * value:.1f} %" for value in shares),
        "-" if model.overlap is None else f"{model.overlap:.3f}",
    )


@dataclass(frozen=True)
class _Panel:
    """Models whose quality is comparable."""

    quality: Literal["perplexity", "accuracy"]
    title: str
    models: list[tuple[ComparedModel, float, float | None]]  # and their quality, and the dense model's

    def show(self, value: float) -> str:
        if self.quality == "accuracy":
            return f"{value:.3f}"
        return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def draw_comparison(path: Path, models: Sequence[ComparedModel]) -> None:
    """Draws a panel for each text that perplexity was measured on, and one for each set of tasks."""
    panels = _panels([model for model in models if model.removed_fraction is not None])
    if not panels:
        raise UserError(
            "nothing to draw: no result has a quality and a removed fraction (launch/evaluate.py --dense gives it one)"
        )
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    methods = sorted({model.method for model in models}, key=str)
    styles = {method: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, method in enumerate(methods)}
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8, 4.2 * len(panels)), layout=ConstrainedLayoutEngine(h_pad=0.12))
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        labels = [_draw_panel(axes, panel, styles) for axes, panel in zip(rows, panels, strict=True)]
        figure.draw_without_rendering()  # settles where the points are
        for axes, of_panel in zip(rows, labels, strict=True):
            for text, at in of_panel:
                label_beside(axes, text, at, color=TEXT, fontsize=9)
        try:
            save_picture(figure, path)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {path} cannot be written: {error}") from None


def _panels(models: Sequence[ComparedModel]) -> list[_Panel]:
    panels = []
    for measured_on in dict.fromkeys(model.measured_on for model in models):
        same = [m for m in models if m.measured_on == measured_on]
        measured = [(m, m.perplexity, m.dense_perplexity) for m in same if m.perplexity is not None]
        panels.append(_Panel("perplexity", f"Perplexity on {measured_on}", measured))
    for tasks in dict.fromkeys(model.tasks for model in models):
        same = [m for m in models if m.tasks == tasks]
        measured = [(m, m.accuracy, m.dense_accuracy) for m in same if m.accuracy is not None]
        panels.append(_Panel("accuracy", f"Mean accuracy, zero-shot: {', '.join(tasks)}", measured))
    return [panel for panel in panels if panel.models]


def _draw_panel(axes: "Axes", panel: _Panel, styles: Styles) -> list[Label]:
    """Draws the curves. Returns the labels of their points."""
    labels: list[Label] = []
    for method in dict.fromkeys(model.method for model, *_ in panel.models):
        mine = [(model, value) for model, value, _ in panel.models if model.method == method]
        x, y = [100 * (model.removed_fraction or 0.0) for model, _ in mine], [value for _, value in mine]
        # A line joins models that differ in the ratio alone, by at least half a percent point. They need no names.
        is_curve = method is not None and all(after - before >= 0.5 for before, after in pairwise(x))
        colour, marker = styles[method]
        axes.plot(x, y, color=colour, marker=marker, ls="-" if is_curve else "", lw=1.2, label=method or "evaluated")
        names = ["" if is_curve else f" {model.name}" for model, _ in mine]
        labels += [(panel.show(v) + name, (u, v)) for name, u, v in zip(names, x, y, strict=True)]
    baselines = sorted({float(f"{dense:.4g}") for *_, dense in panel.models if dense is not None})
    axes.plot([0.0] * len(baselines), baselines, color=GREY, marker="_", ls="", markersize=12, mew=2, label="dense")
    values = [value for _, value, _ in panel.models] + baselines
    if panel.quality == "perplexity" and max(values) > LOG_FROM * min(values):
        make_logarithmic(axes)
    axes.set_xlim(-1.5, max(2.0, *(x for _, (x, _) in labels)) * 1.08)
    axes.margins(y=0.14)
    for baseline in baselines:
        axes.axhline(baseline, color=GREY, lw=0.8, ls=":", zorder=1)
        labels.append((panel.show(baseline), (0.0, baseline)))
    axes.set_title(panel.title)
    axes.set_ylabel(f"{panel.quality} ({'lower' if panel.quality == 'perplexity' else 'higher'} is better)")
    axes.set_xlabel("parameters removed, % of the whole model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)  # inside it would hide a value
    return labels
