"""Shows means and spreads over seeds, as rows, as a table and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraprune_ds.evaluate.drawing import PLOT_STYLE
from tests.benchmarks.quality_settings import GROUPS

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


def table(rows: Sequence[Row]) -> str:
    """Returns plain text, with the spread over seeds in brackets."""
    lines = [f"{'setting':<30}{'seeds':>6}{'tokens':>9}{'removed':>9}" + "".join(f"{t:>18}" for t in TEXTS)]
    for row in rows:
        perplexities = "".join(f"{row[t]['mean']:>10.2f} ({row[t]['spread']:5.2f})" for t in TEXTS)
        lines.append(
            f"{row['setting']:<30}{len(row['seeds']):>6}{row['tokens']:>9,}{row['removed_linear_fraction']:>9.2%}"
            f"{perplexities}"
        )
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Row], dense: dict[str, float]) -> None:
    """Draws perplexity on the test text and on the other text, a line of dots each.

    Groups stand apart, the best of each on top. A bar has the length of the spread over the seeds, with the mean in its
    middle.

    Args:
        dense: of the dense model, by text: the dashed lines.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    height = places(rows)
    top = {
        group: min(height[row["setting"]] for row in rows if row["group"] == group)
        for group in {r["group"]: None for r in rows}
    }
    with plt.style.context([PLOT_STYLE]):
        figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.26 * max(height.values())), sharey=True)
        for axis, text in zip(axes, ("test", "other"), strict=True):
            means = [row[text]["mean"] for row in rows]
            half = [row[text]["spread"] / 2 for row in rows]
            heights = [height[row["setting"]] for row in rows]
            axis.errorbar(means, heights, xerr=half, fmt="o", markersize=4, color="#2F6B9A")
            axis.axvline(dense[text], linestyle="--", linewidth=1, color="#888888")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(TICKS[text]))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_title(f"{text} text (dashed: uncut)")
            axis.set_xlabel("perplexity, log scale; bar: over the seeds")
        for group, place in top.items():
            axes[0].annotate(GROUPS[group], (0.01, place - 0.75), xycoords=("axes fraction", "data"), fontsize=8)
        axes[0].set_yticks(list(height.values()), list(height))
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def places(rows: Sequence[Row]) -> dict[str, float]:
    """Returns the height of each setting, with a gap between two groups."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found: dict[str, float] = {}
    for number, members in enumerate(groups.values()):
        for row in sorted(members, key=lambda row: row["test"]["mean"]):
            found[row["setting"]] = len(found) + 1.2 * number
    return found
