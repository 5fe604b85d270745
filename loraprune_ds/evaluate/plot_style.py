"""How all pictures look."""

from typing import Any

TEXT = "#444444"
PLOT_STYLE: Any = {  # matplotlib's own type for the keys lists them all, and only once it is imported
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
