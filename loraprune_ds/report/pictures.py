"""Draws the two pictures of a run: what every layer kept, and how training went."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune_ds.evaluate.drawing import BLUE, GREEN, ORANGE, PLOT_STYLE, VERMILION, label_point, save_picture
from loraprune_ds.model.family import Kind
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.report.records import CutRecord, EvaluationRecord, History
from loraprune_ds.units import format_perplexity

if TYPE_CHECKING:  # takes a second to import, so only where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE, CUT = "#DDDDDD", "#C4C4C4"
STYLE: Any = PLOT_STYLE | {"axes.titlepad": 8, "axes.grid.axis": "y"}
# Such a curve is drawn whole on the edge of the axes. The layout would make room for it, and collapse without points.
UNCLIPPED: Any = {"clip_on": False, "in_layout": False}
# The title and colour of a kind.
PANELS: dict[Kind, tuple[str, str]] = {
    "heads": ("Key-value heads", BLUE),
    "channels": ("MLP channels", ORANGE),
    "experts": ("Experts", ORANGE),
}


def draw_kept_groups(path: Path, dense: ModelShape, pruned: ModelShape) -> None:
    """Draws the groups of each kind that every layer kept, as bars before what it had. A protected layer is full."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.2), layout="constrained")
        panels = figure.subplots(len(dense.kinds), 1, sharex=True)
        layers = range(len(dense.layers))
        for axes, kind in zip(panels, dense.kinds, strict=True):
            title, colour = PANELS[kind]
            had, kept = ([layer[kind] for layer in shape.layers] for shape in (dense, pruned))
            axes.bar(layers, had, width=0.8, color=PALE, label="dense model")
            axes.bar(layers, kept, width=0.8, color=colour, label="kept")
            axes.set_title(f"{title}: {sum(kept):,} of {sum(had):,} kept ({100 * sum(kept) / sum(had):.0f} %)")
            axes.set_ylabel(f"{kind} per layer")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.margins(x=0.01)
            _legend_above(axes)
        panels[-1].set_xlabel("decoder layer")
        panels[-1].xaxis.set_major_locator(MaxNLocator(16, integer=True))
        _save(figure, path)


def draw_training(path: Path, history: History) -> None:
    """Draws loss, held-out perplexities, sparsity, seconds and bytes per rank over the steps, with the cuts marked."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 8.2), layout=ConstrainedLayoutEngine(h_pad=0.09))
        grid = figure.add_gridspec(3, 2, height_ratios=(1.5, 1, 1))
        loss = figure.add_subplot(grid[0, :])
        sparsity, seconds, weights, memory = (figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(4))
        _draw_loss(loss, history)
        _draw_sparsity(sparsity, history)
        _draw_seconds(seconds, history)
        steps = [s.step for s in history.steps]
        _draw_bytes(weights, "Weights per rank", steps, [s.weight_bytes for s in history.steps], BLUE)
        _draw_bytes(memory, "Memory in use per rank", steps, [s.resident_bytes for s in history.steps], GREEN)
        for axes in (loss, sparsity, seconds, weights, memory):
            _mark_cuts(axes, history.cuts)
            axes.set_xlim(0, max([1, *steps]))
            axes.locator_params(axis="x", integer=True)
        loss.plot([], [], color=CUT, lw=0.8, label="cut")
        _legend_above(loss)
        for axes in (weights, memory):
            axes.set_xlabel("step")
        _save(figure, path)


def _draw_loss(axes: "Axes", history: History) -> None:
    """Draws the loss, and held-out perplexities on the same axis by their logarithm, which is a loss too."""
    known = [s for s in history.steps if math.isfinite(s.loss)]  # somebody else's trainer tells not every step's
    axes.plot([s.step for s in known], [s.loss for s in known], color=BLUE, lw=1.2, label="training")
    held_out = [e for e in history.evaluations if math.isfinite(e.perplexity)]
    points = [e.step for e in held_out], [math.log(e.perplexity) for e in held_out]
    label = "held-out text, with its perplexity"
    axes.plot(*points, color=VERMILION, ls="", marker="o", markersize=5, zorder=4, label=label, **UNCLIPPED)
    for evaluation in held_out:
        _label_perplexity(axes, evaluation)
    axes.set_title("Loss")
    axes.set_ylabel("nats per token")
    axes.margins(y=0.12)


def _label_perplexity(axes: "Axes", evaluation: EvaluationRecord) -> None:
    """Writes a perplexity beside its point, on the side where the axes go on. Evaluations on the way need no words."""
    placement = {
        "dense": ("dense", (2, 10), "left"),
        "after_last_cut": ("after the last cut", (0, 14), "right"),
        "pruned": ("exported", (0, -13), "right"),
    }
    if evaluation.name not in placement:
        return
    name, offset, alignment = placement[evaluation.name]
    text = f"{format_perplexity(evaluation.perplexity)} {name}"
    point = (evaluation.step, math.log(evaluation.perplexity))
    label_point(axes, text, point, offset, alignment, color=VERMILION, in_layout=False)


def _draw_sparsity(axes: "Axes", history: History) -> None:
    steps, percent = [s.step for s in history.steps], [100 * s.sparsity for s in history.steps]
    # A cut follows its step. So the value of a step is drawn up to it, and the curve jumps on the line of the cut.
    axes.plot(steps, percent, color=BLUE, lw=1.6, drawstyle="steps-pre", label="reached", **UNCLIPPED)
    targets = [100 * c.target for c in history.cuts]
    axes.plot([c.step for c in history.cuts], targets, color=VERMILION, lw=1, ls="--", label="target")
    axes.set_title("Decoder linear layers")
    axes.set_ylabel("% removed")
    axes.set_ylim(0)
    _legend_above(axes)


def _draw_seconds(axes: "Axes", history: History) -> None:
    """Draws the seconds of all steps but the first, which is a warm-up several times as long."""
    axes.plot([s.step for s in history.steps[1:]], [s.seconds for s in history.steps[1:]], color=BLUE, lw=1.3)
    axes.set_title("Time per step")
    axes.set_ylabel("seconds")
    axes.set_ylim(0)


def _draw_bytes(axes: "Axes", title: str, steps: list[int], per_rank: list[list[int]], colour: str) -> None:
    """Draws the fullest rank as a line, and the others as a band below it."""
    most, least = [max(b) for b in per_rank], [min(b) for b in per_rank]
    scale, unit = (1e9, "GB") if max(most, default=0) >= 1e9 else (1e6, "MB")
    top, bottom = [b / scale for b in most], [b / scale for b in least]
    axes.plot(steps, top, color=colour, lw=1.6, drawstyle="steps-pre")
    axes.fill_between(steps, bottom, top, step="pre", color=colour, alpha=0.25, lw=0)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.08 * max([*top, 1 / scale]))


def _mark_cuts(axes: "Axes", cuts: Sequence[CutRecord]) -> None:
    """Draws a thin line per cut. With many cuts the lines are thinner, so that they do not hide the curve."""
    width = min(0.8, 24 / max(len(cuts), 1))
    for cut in cuts:
        axes.axvline(cut.step, color=CUT, lw=width, zorder=0)


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2, handlelength=1.6)


def _save(figure: "Figure", path: Path) -> None:
    figure.align_ylabels()
    save_picture(figure, path)
