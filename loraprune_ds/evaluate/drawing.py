"""The style that all pictures share: colours, labels and the file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes a second to import, so only where a picture is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito. They differ in grey and for every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY_BLUE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
TEXT = "#444444"
PLOT_STYLE: Any = {  # matplotlib's own type lists all keys, and exists only once it is imported
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": TEXT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#EEEEEE",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
}

LOG_FROM = 4.0  # an axis of perplexities is logarithmic if largest / smallest exceeds this
# Places of a label near its point: distances in points of a font, then directions and the end of the text that is near.
DISTANCES = (8, 15, 24, 36, 48, 60)
DIRECTIONS = ((1, -1, "left"), (1, 1, "left"), (1, 0, "left"), (-1, -1, "right"), (-1, 1, "right"), (-1, 0, "right"))


@contextmanager
def picture(
    path: Path, size: tuple[float, float], style: Any = PLOT_STYLE, layout: Any = "constrained"
) -> Iterator["Figure"]:
    """Yields an empty figure, and saves it at the end. Without pyplot it needs no display and no global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout=layout)
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


def label_beside(axes: "Axes", text: str, at: tuple[float, float], **options: Any) -> None:
    """Writes `text` at the place nearest to the point `at` that has no curve and no other label.

    The figure must be laid out (`draw_without_rendering`), with all its curves. `options` are passed to `annotate`.
    """
    taken, inside = [label.get_window_extent() for label in axes.texts], axes.get_window_extent()
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.get_lines()]
    places = [((d * x, d * y), side) for d, (x, y, side) in product(DISTANCES, DIRECTIONS)]
    for place in places:
        _label(axes, text, at, *place, **options)
        box = axes.texts[-1].get_window_extent()
        hit = box.count_overlaps(taken) or any(curve.intersects_bbox(box, filled=False) for curve in curves)
        if not hit and inside.contains(*box.min) and inside.contains(*box.max):
            return
        axes.texts[-1].remove()
    _label(axes, text, at, *places[0], **options)


def _label(
    axes: "Axes", text: str, at: tuple[float, float], offset: tuple[float, float], side: str, **options: Any
) -> None:
    """Writes `text` with a white rim, which makes it readable on a curve."""
    from matplotlib.patheffects import withStroke

    place: Any = {"xytext": offset, "textcoords": "offset points", "ha": side, "va": "center"}
    rim = [withStroke(linewidth=3, foreground="white")]
    axes.annotate(text, at, **place, annotation_clip=False, path_effects=rim, **options)
