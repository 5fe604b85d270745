"""The numbers by which models compare, read from the JSON of an evaluation or of a run. Needs no torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from loraprune_ds.units import aligned, format_percent, format_perplexity


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
    "ended": Measure(format_percent, format_percent),
    "repetition": Measure(format_percent, format_percent, "lower"),
    "empty": Measure(format_percent, format_percent, "lower"),
    "answer perplexity": Measure(format_perplexity, "{:.2f}".format, "lower"),  # the dense model's, of the answers
    "agreement": Measure(format_percent, format_percent),
    "overlap": Measure("{:.3f}".format, "{:.3f}".format),
}
ANSWER_MEASURES = {  # those that show a model which no longer answers come first
    "ended": format_percent,
    "repetition": format_percent,
    "empty": format_percent,
    "dense_perplexity": format_perplexity,
    "tokens": "{:.1f}".format,
}


def mean_metric(tasks: dict[str, Any], metric: str) -> float | None:
    """Returns the mean over the tasks with a metric, such as "acc" or "exact_match". None without such tasks."""
    values = [tasks["results"][name][f"{metric},none"] for name in tasks_with(tasks, metric)]
    return sum(values) / len(values) if values else None


def tasks_with(tasks: dict[str, Any], metric: str) -> list[str]:
    return [name for name, metrics in tasks["results"].items() if f"{metric},none" in metrics]


def answers_table(title: str, answers: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of a table, with a row for all answers and one for each kind of prompt.

    Args:
        answers: the dense model's, if there are any, then the pruned model's, as in `--json`. Older files lack some.
    """
    shown = {key: form for key, form in ANSWER_MEASURES.items() if answers[0].get(key) is not None}
    kinds = {kind: [one["by_kind"][kind] for one in answers] for kind in answers[0].get("by_kind", ())}
    rows = [("", *(key.replace("_", " ") for key in shown))]
    for name, means in (("all", answers), *kinds.items()):
        rows.append((name, *(" -> ".join(form(one[key]) for one in means) for key, form in shown.items())))
    yield title + (", dense -> pruned" if len(answers) > 1 else "")
    yield from aligned(rows, "<" + ">" * len(shown))
