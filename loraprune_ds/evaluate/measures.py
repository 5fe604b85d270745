"""The numbers by which models compare, read from the JSON of an evaluation or of a run. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loraprune_ds.units import format_percent, format_perplexity


@dataclass(frozen=True)
class Measure:
    """A number to compare models by, and its form in the table and in the picture."""

    cell: Callable[[float], str]
    label: Callable[[float], str]
    better: Literal["lower", "higher"] = "higher"


MEASURES = {
    "perplexity": Measure(format_perplexity, lambda value: f"{value:.1f}" if value < 1e4 else f"{value:.1e}", "lower"),
    "accuracy": Measure("{:.4f}".format, "{:.3f}".format),
    "exact match": Measure("{:.4f}".format, "{:.3f}".format),
    "repetition": Measure(format_percent, format_percent, "lower"),
    "ended": Measure(format_percent, format_percent),
    "agreement": Measure(format_percent, format_percent),
    "overlap": Measure("{:.3f}".format, "{:.3f}".format),
}


def mean_metric(tasks: dict[str, Any], metric: str) -> float | None:
    """Returns the mean over the tasks with a metric, such as "acc" or "exact_match". None without such tasks."""
    values = [tasks["results"][name][f"{metric},none"] for name in tasks_with(tasks, metric)]
    return sum(values) / len(values) if values else None


def tasks_with(tasks: dict[str, Any], metric: str) -> list[str]:
    return [name for name, metrics in tasks["results"].items() if f"{metric},none" in metrics]
