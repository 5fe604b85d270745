"""The style that all pictures share: colours, labels and the file that is written."""

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


def label_point(
    axes: "Axes", text: str, at: tuple[float, float], offset: tuple[float, float], side: str, **options: Any
) -> None:
    """Writes `text` beside the point `at`, with a white rim, so that it is readable on a curve.

    Args:
        at: in the data's units.
        offset: from the point, in points of a font.
        side: the end of the text that lies there: "left" or "right".
        options: of matplotlib's `annotate`.
    """
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        at,
        xytext=offset,
        textcoords="offset points",
        ha=side,
        va="center",
        annotation_clip=False,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        **options,
    )


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes the file and the folder around it. A `Figure` without pyplot needs no display and no global state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
