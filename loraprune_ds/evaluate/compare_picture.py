"""Quality against the true removed fraction, as one picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.compare import Result
from loraprune_ds.evaluate.plot_style import PLOT_STYLE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours: told apart with any kind of colour vision, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#777777"
LOG_FROM = 4.0  # ratio of the largest to the smallest perplexity from which the axis is logarithmic
LABEL_GAP = 13.0  # points from label to label, above one line of text


@dataclass(frozen=True)
class _Panel:
    """Results whose quality compares."""

    title: str
    label: str
    higher_is_better: bool
    results: list[Result]
    value: Callable[[Result], float | None]
    dense: Callable[[Result], float | None]
    show: Callable[[float], str]


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    result: Result


def draw_comparison(path: Path, results: Sequence[Result]) -> None:
    """One panel for each thing perplexities were measured on, one for accuracy if any was.

    Raises:
        UserError: no result has both a quality and a removed fraction, or the file cannot be written.
    """
    panels = _panels([result for result in results if result.removed_fraction is not None])
    if not panels:
        raise UserError(
            "nothing to draw: no result has a quality and a removed fraction (launch/evaluate.py --dense gives it one)"
        )
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    styles = _styles(results)
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(8, 4.2 * len(panels)), layout=ConstrainedLayoutEngine(h_pad=0.12))
        for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _draw_panel(axes, panel, styles)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, facecolor="white")
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {path} cannot be written: {error}") from None


def _panels(results: Sequence[Result]) -> list[_Panel]:
    panels = []
    for measured_on in dict.fromkeys(result.measured_on for result in results):
        found = [r for r in results if r.measured_on == measured_on and r.perplexity is not None]
        panels.append(
            _Panel(
                title=f"Perplexity on {measured_on}",
                label="perplexity (lower is better)",
                higher_is_better=False,
                results=found,
                value=lambda result: result.perplexity,
                dense=lambda result: result.dense_perplexity,
                show=lambda value: f"{value:.1f}" if value < 1e4 else f"{value:.1e}",
            )
        )
    for tasks in dict.fromkeys(result.tasks for result in results):
        found = [r for r in results if r.tasks == tasks and r.accuracy is not None]
        panels.append(
            _Panel(
                title=f"Mean accuracy, zero-shot: {', '.join(tasks)}",
                label="accuracy (higher is better)",
                higher_is_better=True,
                results=found,
                value=lambda result: result.accuracy,
                dense=lambda result: result.dense_accuracy,
                show=lambda value: f"{value:.3f}",
            )
        )
    return [panel for panel in panels if panel.results]


def _styles(results: Sequence[Result]) -> dict[str | None, tuple[str, str]]:
    """Colour and marker of every method, the same in all panels."""
    methods = sorted({result.method for result in results}, key=str)
    return {m: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def _draw_panel(axes: "Axes", panel: _Panel, styles: dict[str | None, tuple[str, str]]) -> None:
    points = [_Point(100 * (r.removed_fraction or 0.0), panel.value(r) or 0.0, r) for r in panel.results]
    labels: list[tuple[_Point, str]] = []
    for method in dict.fromkeys(result.method for result in panel.results):
        mine = [point for point in points if point.result.method == method]
        # A line joins what only the ratio sets apart, and then no point needs its name.
        is_curve = method is not None and _far_apart([point.x for point in mine])
        colour, marker = styles[method]
        at = [point.x for point in mine], [point.y for point in mine]
        axes.plot(*at, color=colour, marker=marker, ls="-" if is_curve else "", lw=1.2, label=method or "evaluated")
        labels += [(point, "" if is_curve else f" {point.result.name}") for point in mine]
    baselines = sorted({float(f"{dense:.4g}") for r in panel.results if (dense := panel.dense(r)) is not None})
    axes.plot([0.0] * len(baselines), baselines, color=GREY, marker="_", ls="", markersize=12, mew=2, label="dense")
    values = [point.y for point in points] + baselines
    if not panel.higher_is_better and max(values) > LOG_FROM * min(values):
        _make_logarithmic(axes)
    axes.set_xlim(-1.5, max(2.0, *(point.x for point in points)) * 1.08)
    axes.margins(y=0.14)
    for baseline in baselines:
        axes.axhline(baseline, color=GREY, lw=0.8, ls=":", zorder=1)
        _annotate(axes, (0.0, baseline), panel.show(baseline), (8, 7), "left")
    _label_points(axes, labels, panel)
    axes.set_title(panel.title)
    axes.set_ylabel(panel.label)
    axes.set_xlabel("parameters removed, % of the whole model")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=1.6)  # beside: inside it would hide a value


def _far_apart(xs: Sequence[float]) -> bool:
    """Whether the values, ascending, differ by half a percent point at least."""
    return all(after - before >= 0.5 for before, after in pairwise(xs))


def _make_logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_points(axes: "Axes", labels: Sequence[tuple[_Point, str]], panel: _Panel) -> None:
    """To the left of each point, on the side of its curve where that does not go, further off where a label is."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the limits, which say where things are in points
    away = -1 if panel.higher_is_better else 1
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
        _annotate(axes, (point.x, point.y), text, offset, "left" if to_right else "right")


def _annotate(axes: "Axes", at: tuple[float, float], text: str, offset: tuple[float, float], side: str) -> None:
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=side,
        va="center",
        color=TEXT,
        fontsize=9,
        annotation_clip=False,
        path_effects=[withStroke(linewidth=3, foreground="white")],  # readable where it lies on a curve
    )
