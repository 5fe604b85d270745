"""Draws how the router spread the held-out text over the experts, before the first cut and after the last one."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprune_ds.evaluate.drawing import ORANGE, PLOT_STYLE, save_picture
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.report.records import EvaluationName, History

PANELS: dict[EvaluationName, str] = {"dense": "Router's load, dense", "after_last_cut": "after the last cut"}
STYLE: Any = PLOT_STYLE | {"axes.titlepad": 8, "axes.grid": False}


def draw_router_load(path: Path, dense: ModelShape, kept: Sequence[LayerKeep], history: History) -> None:
    """Draws a strip per layer and a cell per expert of the dense model, darker where more tokens chose it.

    A run without experts has no such picture, and neither has one that did not measure both.
    """
    measured = {name: record.expert_choices for name in PANELS if (record := history.evaluation(name))}
    if len(measured) < len(PANELS) or not all(measured.values()):
        return
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    all_of_them = [range(layer["experts"]) for layer in dense.layers]
    places = {"dense": all_of_them, "after_last_cut": [keep["experts"].tolist() for keep in kept]}
    most = max(map(len, all_of_them))
    loads = {name: [load(c, at, most) for c, at in zip(measured[name], places[name], strict=True)] for name in PANELS}
    largest = max(x for strips in loads.values() for strip in strips for x in strip if not math.isnan(x))
    with matplotlib.rc_context(STYLE):
        height = min(max(0.115 * len(dense.layers), 1.4), 9.0)
        figure = Figure(figsize=(11, 1.3 + height), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True)
        shades = LinearSegmentedColormap.from_list("load", ["white", ORANGE, "black"]).with_extremes(bad="#DDDDDD")
        for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
            image = axes.imshow(loads[name], cmap=shades, vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
            axes.set_title(title)
            axes.set_xlabel("expert of the dense model, grey is removed")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[0].set_ylabel("decoder layer")
        panels[0].yaxis.set_major_locator(MaxNLocator(12, integer=True))
        figure.colorbar(image, ax=panels, label="tokens, 1 is an even share")
        save_picture(figure, path)


def load(choices: Sequence[int], places: Sequence[int], experts: int) -> list[float]:
    """Returns the load of each expert of the dense model. It is 1 where all are chosen alike, NaN where one is gone."""
    strip, total = [math.nan] * experts, max(1, sum(choices))
    for place, count in zip(places, choices, strict=True):
        strip[place] = count * len(choices) / total
    return strip
