"""Draws pictures in one style: the groups that every layer of a run kept, the training, and the sizes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune_ds.files import JsonObject
from loraprune_ds.report.records import (
    CutRecord,
    EvaluationName,
    EvaluationRecord,
    History,
    StepRecord,
)
from loraprune_ds.units import format_percent, format_perplexity
from loraprune_ds.versions import has

if TYPE_CHECKING:  # they take a second to import, which only pictures need
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    from loraprune_ds.model.groups import Kind, LayerKeep
    from loraprune_ds.model.shape import ModelShape

Label = tuple["Axes", str, tuple[float, float]]  # a text and its point
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
# Places of a label near its point: distances in points of a font, then directions and the end of the text that is near.
DISTANCES = (8, 15, 24, 36, 48, 60)
DIRECTIONS = (
    (1, -1, "left"),
    (1, 1, "left"),
    (1, 0, "left"),
    (-1, -1, "right"),
    (-1, 1, "right"),
    (-1, 0, "right"),
)
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
        figure.align_ylabels()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")


def scale_perplexity(axes: "Axes", values: Sequence[float]) -> None:
    """Makes the y axis logarithmic, with plain numbers, if the perplexities lie far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if max(values) <= LOG_FROM * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_points(figure: "Figure", labels: Iterable[Label], **options: Any) -> None:
    """Writes each text at the place nearest to its point that has no curve and no other label.

    The figure must have all its curves. `options` are passed to `annotate`.
    """
    from matplotlib.patheffects import withStroke

    figure.draw_without_rendering()  # settles where the points are
    for axes, text, point in labels:
        taken = [label.get_window_extent() for label in axes.texts]
        label = axes.annotate(
            text,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # readable on a curve
            **options,
        )
        _place(label, axes, taken)


def _place(label: "Annotation", axes: "Axes", taken: "list[Bbox]") -> None:
    """Moves a label to the first free place near its point, or to the very first place if none is free."""
    inside = axes.get_window_extent()
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines()]
    places = list(product(DISTANCES, DIRECTIONS))
    for distance, (x, y, side) in (*places, places[0]):
        label.set(position=(distance * x, distance * y), ha=side)
        box = label.get_window_extent()
        crosses = any(curve.intersects_bbox(box, filled=False) for curve in curves)
        if crosses or box.count_overlaps(taken):
            continue
        if inside.contains(*box.min) and inside.contains(*box.max):
            break


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
            labels = _draw_perplexity(figure.add_subplot(grid[0, 1]), cuts, measured)
            label_points(figure, labels, color=VERMILION, in_layout=False)


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
) -> list[Label]:
    """Draws held-out perplexity over the removed fraction, in the order of measurement. Returns the points' labels."""
    removed = [100 * _removed_at(e.step, cuts) for e in measured]
    values = [e.perplexity for e in measured]
    axes.plot(removed, values, **MEASURED)
    scale_perplexity(axes, values)
    axes.margins(y=0.2)
    most = max(*removed, 1)
    axes.set(
        title="Perplexity, held-out text",
        xlabel="% of the decoder's linear layers removed",
        xlim=(-0.05 * most, 1.6 * most),  # with room for the labels of the last points
    )
    points = zip(removed, measured, strict=True)
    return [(axes, _describe(e), (x, e.perplexity)) for x, e in points if e.name in NAMES]


def _describe(evaluation: EvaluationRecord) -> str:
    return f"{format_perplexity(evaluation.perplexity)} {NAMES[evaluation.name]}"


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


def draw_shelf(path: Path, shelf: Sequence[JsonObject], dense: float | None) -> bool:
    """Draws perplexity and agreement over parameters, with the dense perplexity. `shelf` is report.json's.

    Returns:
        Whether there is a picture. Without a perplexity there is nothing to draw.
    """
    measured = [row for row in shelf if row["perplexity"]]
    if not measured or not has("matplotlib"):
        return False
    with picture(path, (7, 4)) as figure:
        axes = figure.subplots()
        millions = [row["parameters"] / 1e6 for row in measured]
        values = [row["perplexity"] for row in measured]
        axes.plot(millions, values, **MEASURED)
        if dense is not None:
            label = f"dense model: {format_perplexity(dense)}"
            axes.axhline(dense, color=CUT, lw=1, ls=":", label=label)
            axes.legend(**LEGEND_ABOVE)
        scale_perplexity(axes, values)
        axes.margins(x=0.3, y=0.25)
        axes.set(
            title="Sizes of one run",
            xlabel="parameters, millions",
            ylabel="perplexity, held-out text",
        )
        rows = zip(map(_describe_size, measured), millions, values, strict=True)
        label_points(figure, [(axes, text, (x, y)) for text, x, y in rows], color=TEXT)
    return True


def _describe_size(row: JsonObject) -> str:
    agrees = f", agrees {format_percent(row['agreement'])}" if row.get("agreement") else ""
    return f"{row['size']}: {format_perplexity(row['perplexity'])}{agrees}"
