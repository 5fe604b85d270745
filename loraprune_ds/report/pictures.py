"""Draws pictures in one style: the groups that every layer of a run kept, and the training."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune_ds.report.records import (
    CutRecord,
    EvaluationName,
    EvaluationRecord,
    History,
    StepRecord,
)
from loraprune_ds.units import format_perplexity

if TYPE_CHECKING:  # they take a second to import, which only pictures need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

    from loraprune_ds.model.groups import Kind, LayerKeep
    from loraprune_ds.model.shape import ModelShape

# The colours of Okabe and Ito. They differ in grey and for every kind of colour vision.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
SKY_BLUE = "#56B4E9"
TEXT = "#444444"
STYLE = Path(__file__).with_name("pictures.mplstyle")
LOG_FROM = 4.0  # an axis of perplexities is logarithmic if largest / smallest exceeds this
LABEL = "label"  # the gid of a text beside a point
BESIDE = 8  # right of the point, in points of print
MOST_SHIFT = 150
PALE = "#DDDDDD"  # removed groups
CUT = "#C4C4C4"
# Such a curve is drawn whole on the edge of the axes. The layout would make room for it, and collapse without points.
UNCLIPPED: Any = {"clip_on": False, "in_layout": False}
MEASURED: Any = {"color": VERMILION, "lw": 1.2, "marker": "o", "markersize": 5}
LEGEND_ABOVE: Any = {
    "loc": "lower right",
    "bbox_to_anchor": (1, 1),
    "ncols": 3,
    "borderaxespad": 0.2,
}
MOST_NUMBERED = 48  # layers whose counts are written down
# Evaluations during the run have no label.
NAMES: dict[EvaluationName, str] = {
    "dense": "dense",
    "after_last_cut": "after the last cut",
    "pruned": "exported",
}
# The title and colour of a kind.
PANELS: "dict[Kind, tuple[str, str]]" = {
    "heads": ("Key-value heads", BLUE),
    "query_heads": ("Query heads", BLUE),
    "channels": ("MLP channels", ORANGE),
    "experts": ("Experts", ORANGE),
    "delta": ("Heads of delta nets", BLUE),
    "cross_heads": ("Cross-attention heads", BLUE),
}


@contextmanager
def picture(
    path: Path, size: tuple[float, float], style: dict[str, Any] | None = None
) -> Iterator["Figure"]:
    """Yields an empty figure, and saves it at the end. Without pyplot it needs no display and no global state.

    Args:
        style: in addition to `STYLE`, under the names of matplotlib's rcParams.
    """
    from matplotlib import style as styles
    from matplotlib.figure import Figure

    with styles.context([STYLE, style or {}]):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        _spread_labels(figure)
        figure.align_ylabels()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")


def curve(
    axes: "Axes", xs: Sequence[float], ys: Sequence[float], labels: Sequence[str] = (), **look: Any
) -> None:
    """Draws a curve. A label that is not empty stands right of its point."""
    from matplotlib.patheffects import withStroke

    (line,) = axes.plot(xs, ys, **look)
    for x, y, text in zip(xs, ys, labels, strict=False):
        if text:
            axes.annotate(
                text,
                (x, y),
                xytext=(BESIDE, 0),
                textcoords="offset points",
                va="center",
                color=line.get_color(),
                gid=LABEL,
                annotation_clip=False,
                path_effects=[withStroke(linewidth=3, foreground="white")],  # readable on a curve
            )


def _spread_labels(figure: "Figure") -> None:
    """Moves each label up or down until it hides no curve and no other label. The figure must be complete."""
    figure.draw_without_rendering()  # settles where the points are
    for axes in figure.axes:
        taken = [box for line in axes.lines for box in _boxes(line)]
        for label in axes.texts:
            if label.get_gid() == LABEL:
                for shift in sorted(range(-MOST_SHIFT, MOST_SHIFT), key=abs):
                    label.set_position((BESIDE, shift))
                    if not label.get_window_extent().count_overlaps(taken):
                        break
                taken.append(label.get_window_extent())


def _boxes(line: "Line2D") -> "Iterator[Bbox]":
    """Yields small boxes along a curve, or at the points of one without a line."""
    from matplotlib.transforms import Bbox

    steps = 1 if line.get_linestyle() == "None" else 40
    path: Any = line.get_transform().transform_path(line.get_path()).interpolated(steps)
    for x, y in path.vertices:
        yield Bbox.from_bounds(x - 6, y - 6, 12, 12)


def scale_perplexity(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the y axis logarithmic, with plain numbers, if the perplexities lie far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if max(values) <= LOG_FROM * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_kept_groups(path: Path, dense: "ModelShape", kept: "Sequence[LayerKeep]") -> None:
    """Draws how many groups of each kind every layer kept."""
    from matplotlib.ticker import MaxNLocator

    layers = len(dense.layers)
    kinds = dense.kinds
    size = (1.5 + 3.5 * len(kinds), 1.3 + min(max(0.115 * layers, 1.4), 9.0))
    with picture(path, size, {"axes.grid": False}) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for kind, axes in zip(kinds, panels, strict=True):
            title, colour = PANELS[kind]
            counts = [layer[kind] for layer in dense.counts]
            kept_counts = [len(keep[kind]) for keep in kept]
            _draw_counts(axes, counts, kept_counts, colour)
            total = sum(counts)
            total_kept = sum(kept_counts)
            percent = 100 * total_kept / total
            axes.set_title(f"{title}: {total_kept:,} of {total:,} kept ({percent:.0f} %)")
        panels[0].set(ylabel="decoder layer", ylim=(layers - 0.5, -0.5))
        panels[0].yaxis.set_major_locator(MaxNLocator(12, integer=True))


def _draw_counts(
    axes: "Axes", counts: Sequence[int], kept_counts: Sequence[int], colour: str
) -> None:
    """Draws the number of kept groups per layer as bars over the dense counts, with numbers if they fit."""
    layers = range(len(counts))
    axes.barh(layers, counts, height=0.8, color=PALE)
    bars = axes.barh(layers, kept_counts, height=0.8, color=colour)
    if len(counts) <= MOST_NUMBERED:
        numbers = [f" {count:,}" for count in kept_counts]
        axes.bar_label(bars, numbers, fontsize=7, color=TEXT, padding=1)
    room = 1.15 * max(counts)  # for the numbers
    axes.set(xlim=(0, room), xticks=[], xlabel="number kept")
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(left=False)


def draw_training(path: Path, history: History) -> None:
    """Draws loss, perplexity over the removed fraction, sparsity, seconds and bytes per rank, and marks the cuts."""
    steps = history.steps
    cuts = history.cuts
    measured = [e for e in history.evaluations if math.isfinite(e.perplexity)]
    first_row = ["loss", "." if measured else "loss"]
    panels: Any = [first_row, ["sparsity", "seconds"], ["weights", "memory"]]
    with picture(path, (10, 8.2), {"figure.constrained_layout.h_pad": 0.09}) as figure:
        axes = figure.subplot_mosaic(panels, height_ratios=(1.5, 1, 1))
        loss = axes["loss"]
        _draw_loss(loss, steps, measured)
        _draw_sparsity(axes["sparsity"], history)
        _draw_seconds(axes["seconds"], steps[1:])  # the first step is a warm-up
        _draw_bytes(axes["weights"], "Weights per rank", steps, "weight_bytes", BLUE)
        _draw_bytes(axes["memory"], "Memory in use per rank", steps, "resident_bytes", GREEN)
        for panel in axes.values():
            for cut in cuts:  # a line at each, thin ones if there are many
                panel.axvline(cut.step, color=CUT, lw=min(0.8, 24 / len(cuts)), zorder=0)
            panel.set_xlim(0, max((step.step for step in steps), default=1))
            panel.locator_params(axis="x", integer=True)
        loss.plot([], [], color=CUT, lw=0.8, label="cut")
        loss.legend(**LEGEND_ABOVE)
        for name in ("loss", "weights", "memory"):
            axes[name].set_xlabel("step")
        if measured:
            grid: Any = loss.get_gridspec()
            _draw_perplexity(figure.add_subplot(grid[0, 1]), cuts, measured)


def _draw_seconds(axes: "Axes", steps: Sequence[StepRecord]) -> None:
    axes.plot([s.step for s in steps], [s.seconds for s in steps], color=BLUE, lw=1.3)
    axes.set(title="Time per step", ylabel="seconds", ylim=(0, None))


def _draw_loss(
    axes: "Axes", steps: Sequence[StepRecord], measured: Sequence[EvaluationRecord]
) -> None:
    """Draws the loss, and held-out losses, which are logarithms of perplexities."""
    # Other trainers report the loss only for some steps.
    with_loss = [s for s in steps if math.isfinite(s.loss)]
    losses = [s.loss for s in with_loss]
    axes.plot([s.step for s in with_loss], losses, color=BLUE, lw=1.2, label="training")
    if measured:
        axes.plot(
            [e.step for e in measured],
            [math.log(e.perplexity) for e in measured],
            ls="",
            zorder=4,
            label="held-out text",
            **MEASURED,
            **UNCLIPPED,
        )
    axes.set(title="Loss", ylabel="nats per token")
    axes.margins(y=0.08)


def _draw_perplexity(
    axes: "Axes", cuts: Sequence[CutRecord], measured: Sequence[EvaluationRecord]
) -> None:
    """Draws held-out perplexity over the removed fraction, in the order of measurement."""
    removed = [100 * _removed_at(e.step, cuts) for e in measured]
    values = [e.perplexity for e in measured]
    labels = [
        f"{format_perplexity(e.perplexity)} {NAMES[e.name]}" if e.name in NAMES else ""
        for e in measured
    ]
    curve(axes, removed, values, labels, **MEASURED)
    scale_perplexity(axes, values)
    axes.margins(y=0.2)
    most = max(*removed, 1)
    axes.set(
        title="Perplexity, held-out text",
        xlabel="% of the decoder's linear layers removed",
        xlim=(-0.05 * most, 1.6 * most),  # with room for the labels of the last points
    )


def _removed_at(step: int, cuts: Sequence[CutRecord]) -> float:
    """Returns the removed fraction of the linear parameters after a step and its cut."""
    return max((cut.reached for cut in cuts if cut.step <= step), default=0.0)


def _draw_sparsity(axes: "Axes", history: History) -> None:
    steps = [s.step for s in history.steps]
    percent = [100 * s.sparsity for s in history.steps]
    # A cut follows its step, so the curve keeps the value up to that step and jumps on the line of the cut.
    axes.plot(
        steps, percent, color=BLUE, lw=1.6, drawstyle="steps-pre", label="reached", **UNCLIPPED
    )
    cuts = [cut.step for cut in history.cuts]
    targets = [100 * cut.target for cut in history.cuts]
    axes.plot(cuts, targets, color=VERMILION, lw=1, ls="--", label="target")
    axes.set(title="Decoder linear layers", ylabel="% removed", ylim=(0, None))
    axes.legend(**LEGEND_ABOVE)


def _draw_bytes(
    axes: "Axes", title: str, records: Sequence[StepRecord], name: str, colour: str
) -> None:
    """Draws the fullest rank as a line, and the others as a band below it."""
    steps = [record.step for record in records]
    per_rank = [getattr(record, name) for record in records]
    most = max(map(max, per_rank), default=0)
    scale = 1e6
    unit = "MB"
    if most >= 1e9:
        scale = 1e9
        unit = "GB"
    top = [max(ranks) / scale for ranks in per_rank]
    bottom = [min(ranks) / scale for ranks in per_rank]
    axes.plot(steps, top, color=colour, lw=1.6, drawstyle="steps-pre")
    axes.fill_between(steps, bottom, top, step="pre", color=colour, alpha=0.25, lw=0)
    highest = max(most, 1) / scale
    axes.set(title=title, ylabel=unit, ylim=(0, 1.08 * highest))
