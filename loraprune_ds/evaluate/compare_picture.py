"""Results of several models side by side, as one picture of quality against the true removed fraction."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.compare import ComparedModel
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE)
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"
Label = tuple[str, tuple[float, float]]  # a text and its point
Styles = dict[str | None, tuple[str, str]]  # method -> colour and marker, the same in all panels


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
    """Draws a panel for each text that perplexity was measured on, and one for each set of tasks.

    Raises:
        UserError: no model has both a quality and a removed fraction, or the file cannot be written.
    """
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
        for axes, found in zip(rows, labels, strict=True):
            for text, at in found:
                label_beside(axes, text, at, color=TEXT, fontsize=9)
        try:
            save_picture(figure, path)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {path} cannot be written: {error}") from None


def _panels(models: Sequence[ComparedModel]) -> list[_Panel]:
    panels = []
    for measured_on in dict.fromkeys(model.measured_on for model in models):
        same = [m for m in models if m.measured_on == measured_on]
        found = [(m, m.perplexity, m.dense_perplexity) for m in same if m.perplexity is not None]
        panels.append(_Panel("perplexity", f"Perplexity on {measured_on}", found))
    for tasks in dict.fromkeys(model.tasks for model in models):
        same = [m for m in models if m.tasks == tasks]
        found = [(m, m.accuracy, m.dense_accuracy) for m in same if m.accuracy is not None]
        panels.append(_Panel("accuracy", f"Mean accuracy, zero-shot: {', '.join(tasks)}", found))
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
