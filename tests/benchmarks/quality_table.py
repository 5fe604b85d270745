"""Shows means and spreads over seeds, as rows and as a picture of a few settings."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprune_ds.evaluate.drawing import BLUE, GREEN, ORANGE, PLOT_STYLE, PURPLE, TEXT, VERMILION, save_picture

LINES = {  # setting -> colour, marker, words of the legend
    "plain": (ORANGE, "o", "lora (plain)"),
    "fisher": (GREEN, "^", "fisher"),
    "fisher-refit-4-steps": (BLUE, "D", "fisher, refit (recipe tuned)"),
    "fisher-refit-distillation-global-4-steps": (PURPLE, "v", "fisher, refit, distillation, global (recipe general)"),
    "general-0.25-temperature-2": (VERMILION, "s", "fisher, refit, 1/4 distillation, global"),
}
PANELS = (  # what the axis shows, the suffixes of the settings elsewhere on it, its label and ticks
    ("tokens", ("-409600",), "tokens of training, 41.7 % removed", {81_920: "81,920", 409_600: "409,600"}),
    (
        "removed_linear_fraction",
        ("-light", "-half"),
        "removed, 81,920 tokens",
        {0.148: "14.8 %", 0.417: "41.7 %", 0.5: "50 %"},
    ),
)
TEXTS_DRAWN = {"test": "WikiText-2 test (dashed: dense)", "other": "other text (dashed: dense)"}
TICKS = {"test": (25, 30, 40, 50, 60, 80, 100, 150, 200), "other": (25, 50, 100, 200, 400, 800, 1600)}
TEXTS = ("validation", "test", "other")
Row = dict[str, Any]


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Builds one row per setting: mean and spread (largest minus smallest) of each perplexity over its seeds."""
    names = list(dict.fromkeys(run["setting"] for run in runs))
    return [_row([run for run in runs if run["setting"] == name]) for name in names]


def _row(runs: list[dict[str, Any]]) -> Row:
    params = runs[0]["report"]["params"]
    return {
        "setting": runs[0]["setting"],
        "group": runs[0]["group"],
        "seeds": [run["seed"] for run in runs],
        "tokens": runs[0]["tokens"],
        "removed_linear_fraction": 1 - params["linear_pruned"] / params["linear_dense"],
        **{text: _spread([run["perplexity"][text] for run in runs]) for text in TEXTS},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "spread": max(values) - min(values)}


def draw(path: Path, rows: Sequence[Row], dense: dict[str, float]) -> None:
    """Draws few settings: perplexity on both texts against the tokens, and against the removed fraction.

    A point is the mean over the seeds, its bar the spread with the mean in the middle. A setting that was measured at
    one place only has no line.

    Args:
        dense: of the dense model, by text: the dashed lines.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context
    from matplotlib.ticker import FixedLocator, NullLocator

    by_name = {row["setting"]: row for row in rows}
    with context([PLOT_STYLE]):
        figure = Figure(figsize=(10, 7.2), layout="constrained")
        panels = figure.subplots(2, 2, sharey="row")
        for (text, heading), line in zip(TEXTS_DRAWN.items(), panels, strict=True):
            for axes, (key, suffixes, label, ticks) in zip(line, PANELS, strict=True):
                for name, (colour, marker, words) in LINES.items():
                    points = [
                        row
                        for n in (name, *(name + suffix for suffix in suffixes))
                        if (row := by_name.get(n)) is not None
                    ]
                    points.sort(key=lambda row: row[key])
                    axes.errorbar(
                        [row[key] for row in points],
                        [row[text]["mean"] for row in points],
                        yerr=[row[text]["spread"] / 2 for row in points],
                        color=colour,
                        marker=marker,
                        label=words,
                    )
                axes.axhline(dense[text], linestyle="--", linewidth=1, color=TEXT)
                axes.set(xscale="log", yscale="log", title=heading, xlabel=label)
                axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
                axes.set_xticklabels(list(ticks.values()))
                axes.yaxis.set_major_locator(FixedLocator(list(TICKS[text])))
                axes.yaxis.set_major_formatter("{x:g}")
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_minor_locator(NullLocator())
            line[0].set_ylabel("perplexity, log scale")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        save_picture(figure, path)
