"""Results of several models side by side, as one picture of quality against the true removed fraction."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

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
    label_point,
    make_logarithmic,
    save_picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY_BLUE)
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"
LABEL_OPTIONS: Any = {"color": TEXT, "fontsize": 9}
LABEL_GAP = 13.0  # points from label to label: more than a line of text
Styles = dict[str | None, tuple[str, str]]  # method -> colour and marker, the same in all panels


@dataclass(frozen=True)
class _Panel:
    """Models whose quality is comparable."""

    quality: Literal["perplexity", "accuracy"]
    title: str
    models: list[ComparedModel]

    def value(self, model: ComparedModel) -> float:
        value = model.perplexity if self.quality == "perplexity" else model.accuracy
        assert value is not None
        return value

    def dense(self, model: ComparedModel) -> float | None:
        return model.dense_perplexity if self.quality == "perplexity" else model.dense_accuracy

    def show(self, value: float) -> str:
        if self.quality == "accuracy":
            return f"{value:.3f}"
        return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


class _Point(NamedTuple):
    x: float
    y: float
    model: ComparedModel


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
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, panel, styles)
        try:
            save_picture(figure, path)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {path} cannot be written: {error}") from None


def _panels(models: Sequence[ComparedModel]) -> list[_Panel]:
    panels = []
    for measured_on in dict.fromkeys(model.measured_on for model in models):
        found = [m for m in models if m.measured_on == measured_on and m.perplexity is not None]
        panels.append(_Panel("perplexity", f"Perplexity on {measured_on}", found))
    for tasks in dict.fromkeys(model.tasks for model in models):
        found = [m for m in models if m.tasks == tasks and m.accuracy is not None]
        panels.append(_Panel("accuracy", f"Mean accuracy, zero-shot: {', '.join(tasks)}", found))
    return [panel for panel in panels if panel.models]


def _draw_panel(axes: "Axes", panel: _Panel, styles: Styles) -> None:
    points = [_Point(100 * (m.removed_fraction or 0.0), panel.value(m), m) for m in panel.models]
    labels: list[tuple[_Point, str]] = []
    for method in dict.fromkeys(model.method for model in panel.models):
        mine = [point for point in points if point.model.method == method]
        # A line joins models that differ in the ratio alone, by at least half a percent point. They need no names.
        is_curve = method is not None and all(after.x - before.x >= 0.5 for before, after in pairwise(mine))
        colour, marker = styles[method]
        at = [point.x for point in mine], [point.y for point in mine]
        axes.plot(*at, color=colour, marker=marker, ls="-" if is_curve else "", lw=1.2, label=method or "evaluated")
        labels += [(point, "" if is_curve else f" {point.model.name}") for point in mine]
    baselines = sorted({float(f"{dense:.4g}") for m in panel.models if (dense := panel.dense(m)) is not None})
    axes.plot([0.0] * len(baselines), baselines, color=GREY, marker="_", ls="", markersize=12, mew=2, label="dense")
    values = [point.y for point in points] + baselines
    if panel.quality == "perplexity" and max(values) > LOG_FROM * min(values):
        make_logarithmic(axes)
    axes.set_xlim(-1.5, max(2.0, *(point.x for point in points)) * 1.08)
    axes.margins(y=0.14)
    for baseline in baselines:
        axes.axhline(baseline, color=GREY, lw=0.8, ls=":", zorder=1)
        label_point(axes, panel.show(baseline), (0.0, baseline), (8, 7), "left", **LABEL_OPTIONS)
    _label_points(axes, labels, panel)
    axes.set_title(panel.title)
    axes.set_ylabel(f"{panel.quality} ({'lower' if panel.quality == 'perplexity' else 'higher'} is better)")
    axes.set_xlabel("parameters removed, % of the whole model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)  # inside it would hide a value


def _label_points(axes: "Axes", labels: Sequence[tuple[_Point, str]], panel: _Panel) -> None:
    """Writes each label on the side of its point that the curve avoids, further away where another label is.

    A label is to the left of its point, unless the point is near the left edge.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the limits, and so where the points are
    away = -1 if panel.quality == "accuracy" else 1
    placed: list[tuple[float, float]] = []  # (x, y) of labels, in points
    for point, name in sorted(labels, key=lambda label: away * label[0].y):
        x, y = axes.transData.transform((point.x, point.y)) * 72 / figure.dpi
        text = panel.show(point.y) + name
        height = y + away * LABEL_GAP / 2
        while any(abs(x - px) < 6 * len(text) and abs(height - py) < LABEL_GAP for px, py in placed):
            height += away
        placed.append((x, height))
        to_right = point.x < axes.get_xlim()[1] / 5
        offset = (6 if to_right else -6, height - y)
        label_point(axes, text, (point.x, point.y), offset, "left" if to_right else "right", **LABEL_OPTIONS)
