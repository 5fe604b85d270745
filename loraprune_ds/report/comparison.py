"""Draws measured models: a panel for each quality, over the removed fraction."""

from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loraprune_ds.report import pictures
from loraprune_ds.report.measured import MEASURES, Measured, qualities
from loraprune_ds.report.pictures import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def draw_comparison(path: Path, models: Sequence[Measured]) -> bool:
    """Draws a panel for each quality on each basis. Returns False if there is nothing to draw."""
    sized = [model for model in models if model.removed is not None]
    panels = qualities(sized)
    if not panels:
        return False
    methods = sorted({model.method for model in models}, key=str)
    looks = dict(zip(methods, cycle(LOOKS), strict=False))
    with pictures.picture(path, (8, 4.2 * len(panels)), STYLE) as figure:
        rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, ((name, basis), compared) in zip(rows, panels.items(), strict=True):
            _draw_panel(axes, name, compared, looks)
            axes.set_title(f"{name.capitalize()}: {basis}")
    return True


def _draw_panel(axes: "Axes", name: str, models: list[Measured], looks: Looks) -> None:
    for method in dict.fromkeys(model.method for model in models):
        of_method = [model for model in models if model.method == method]
        _draw_method(axes, name, of_method, looks[method])
    measure = MEASURES[name]
    values = [model.values[name] for model in models]
    baselines = sorted({float(f"{v.dense:.4g}") for v in values if v.dense is not None})
    most = max(2.0, *map(_percent_removed, models))
    for baseline in baselines:
        labels = ["", f"{measure.write(baseline)} dense"]
        curve(axes, [0.0, most], [baseline] * 2, labels, color=GREY, lw=0.8, ls=":")
    if name == "perplexity":
        pictures.scale_perplexity(axes, [v.value or 0.0 for v in values] + baselines)
    axes.margins(y=0.14)
    axes.set_xlim(-0.03 * most, 1.05 * most)
    axes.set_ylabel(f"{name} ({measure.better} is better)")
    axes.set_xlabel("parameters removed, % of the whole model")


def _percent_removed(model: Measured) -> float:
    return 100 * (model.removed or 0.0)


def _draw_method(axes: "Axes", name: str, models: list[Measured], look: tuple[str, str]) -> None:
    removed = list(map(_percent_removed, models))
    values = [model.values[name].value or 0.0 for model in models]
    method = models[0].method
    # A line joins models that differ in the ratio alone, by at least half a percent point. It has one label.
    joined = method is not None and all(
        after - before >= 0.5 for before, after in pairwise(removed)
    )
    write = MEASURES[name].write
    labels = [f"{write(y)} {model.name}" for model, y in zip(models, values, strict=True)]
    if joined:
        labels = [""] * (len(models) - 1) + [f"{write(values[-1])} {method}"]
    colour, marker = look
    line = "-" if joined else ""
    curve(axes, removed, values, labels, color=colour, marker=marker, ls=line, lw=1.2)
