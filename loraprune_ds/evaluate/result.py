"""The result of an evaluation: JSON for launch/compare.py, a table, and a page with the answers.

And the numbers by which models compare, read from that JSON or from a run's. Needs no torch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.units import aligned, format_change, format_percent, format_perplexity

if TYPE_CHECKING:
    from loraprune_ds.evaluate.evaluation import Measurement

Row = tuple[str, list[str], str]  # name, one cell per column, remark
KINDS = ("greedy", "sampled")
# its columns become rows if two do not fit, as on a phone
PAGE = Path(__file__).with_name("answers.html")


@dataclass(frozen=True)
class Measure:
    """A number to compare models by, and its form in the table and in the picture."""

    cell: Callable[[float], str]
    label: Callable[[float], str]
    better: Literal["lower", "higher"] = "higher"


MEASURES = {
    "perplexity": Measure(
        format_perplexity, lambda value: f"{value:.1f}" if value < 1e4 else f"{value:.1e}", "lower"
    ),
    "accuracy": Measure("{:.4f}".format, "{:.3f}".format),
    "exact match": Measure("{:.4f}".format, "{:.3f}".format),
    "ended": Measure(format_percent, format_percent),
    "repetition": Measure(format_percent, format_percent, "lower"),
    "empty": Measure(format_percent, format_percent, "lower"),
    # the dense model's, of the answers
    "answer perplexity": Measure(format_perplexity, "{:.2f}".format, "lower"),
    "agreement": Measure(format_percent, format_percent),
    "overlap": Measure("{:.3f}".format, "{:.3f}".format),
}
# Those that show a model which no longer answers come first.
ANSWER_MEASURES = {key: MEASURES[key].cell for key in ("ended", "repetition", "empty")}
ANSWER_MEASURES |= {
    "dense_perplexity": MEASURES["answer perplexity"].cell,
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
    kinds = {
        kind: [one["by_kind"][kind] for one in answers] for kind in answers[0].get("by_kind", ())
    }
    rows = [("", *(key.replace("_", " ") for key in shown))]
    for name, means in (("all", answers), *kinds.items()):
        rows.append(
            (name, *(" -> ".join(form(one[key]) for one in means) for key, form in shown.items()))
        )
    yield title + (", dense -> pruned" if len(answers) > 1 else "")
    yield from aligned(rows, "<" + ">" * len(shown))


def make_result(
    measurements: "list[Measurement]",
    settings: EvaluationSettings,
    world_size: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Builds the object of `--json`: the first model's values, the second's under `dense`, settings, provenance."""
    text = settings.text
    return {
        **_model_entries(measurements[0]),
        "dense": _model_entries(measurements[1]) if len(measurements) > 1 else None,
        "text": text and {"name": text.name, "split": text.split, "sha256": text.sha256},
        "protocol": {"window": settings.window, "max_windows": settings.max_windows},
        "batch_size": settings.actual_batch_size,
        "world_size": world_size,
        "sharded": settings.sharded,
        "answers_plan": settings.answers and asdict(settings.answers),
        "speed_plan": settings.speed and asdict(settings.speed),
        **provenance,
    }


def _model_entries(model: "Measurement") -> dict[str, Any]:
    entries = asdict(model)
    perplexity = entries.pop("perplexity") or {"perplexity": None, "tokens": None, "windows": None}
    return perplexity | entries


def result_table(result: dict[str, Any]) -> str:
    """Builds plain text of about 100 columns at most. The dense model is on the left."""
    models = [model for model in (result["dense"], result) if model]
    rows = [*_size_rows(models)]
    for key, rows_of in (("tasks", _task_rows), ("answers", _answer_rows), ("speed", _speed_rows)):
        if models[0][key] is not None:
            rows += rows_of([model[key] for model in models])
    names = ["dense", "model"] if len(models) > 1 else ["model"]
    lines: list[str] = []
    for name, model in zip(names, models, strict=True):
        facts = [model[key] for key in ("kind", "method", "model_type", "dtype") if model[key]]
        lines.append(f"{name:<6} {model['path']} ({', '.join(facts)})")
    if text := result["text"]:
        split = f", split {text['split']}" if text["split"] else ""
        windows = f"{result['windows']:,} windows of {result['protocol']['window']} tokens"
        lines.append(f"text   {text['name']}{split}: {windows}, {result['tokens']:,} predictions")
    cells = [(name, *values, remark) for name, values, remark in [("", names, ""), *rows]]
    table = aligned(cells, f"<{'>' * len(models)}<")
    return "\n".join([*lines, *_answer_lines(result), "", *table, *_answer_tables(models)]) + "\n"


def _answer_lines(result: dict[str, Any]) -> Iterable[str]:
    if result["answers"] is None:
        return
    yield f"answers {describe_plan(result['answers_plan'])}"
    for model in filter(None, (result["dense"], result)):
        if not model["answers"]["chat_template"]:
            yield f"        {model['path']} has no chat template: it continues the prompts as plain text"
    if result["answers"]["closeness"]:
        cost, dense = (
            model["cost"]["macs_per_token"]["total"] for model in (result, result["dense"])
        )
        share = f"1/3 of the dense cost, here {cost / dense:.2f}"
        yield f"draft   accepted at the overlap's rate; pays off only below about {share}"


def _size_rows(models: list[dict[str, Any]]) -> Iterable[Row]:
    """Yields parameters, costs and perplexity."""
    costs, removed = [model["cost"] for model in models], models[-1]["removed_fraction"]
    remark = "" if removed is None else f"{format_percent(removed)} removed"
    yield "parameters", [f"{cost['parameters']:,}" for cost in costs], remark
    macs = [cost["macs_per_token"] for cost in costs]
    context = f"MACs per token at {macs[-1]['mean_context']:g} of context, M"
    for name, values, form in (
        ("  in the layers' linears", [cost["linear_parameters"] for cost in costs], ","),
        (context, [each["total"] / 1e6 for each in macs], ",.1f"),
        ("weights, MB", [cost["weight_bytes"] / 1e6 for cost in costs], ",.1f"),
        (
            "key-value cache per token, kB",
            [cost["kv_bytes_per_token"] / 1e3 for cost in costs],
            ",.1f",
        ),
    ):
        yield name, [format(value, form) for value in values], _less(values)
    values = [model["perplexity"] for model in models]
    if values[0] is not None:
        ratio = (
            f"{values[1] / values[0]:.3f} times"
            if len(values) > 1 and all(map(math.isfinite, values))
            else ""
        )
        yield "perplexity", [format_perplexity(value, 3) for value in values], ratio


def _task_rows(tasks: list[dict[str, Any]]) -> Iterable[Row]:
    """Yields every metric of every task, with the standard error of lm-eval."""
    results = [one["results"] for one in tasks]
    for task, metrics in results[0].items():
        for key in metrics:
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                name = f"{task} {metric}" + (f" ({filtered})" if filtered != "none" else "")
                yield name, [_metric(result[task], metric, filtered) for result in results], ""
    for metric in ("acc", "exact_match"):
        means = [mean_metric(one, metric) for one in tasks]
        if len(tasks_with(tasks[0], metric)) > 1:
            yield f"mean {metric}", [f"{mean:.4f}" for mean in means], ""


def _metric(metrics: dict[str, Any], metric: str, filtered: str) -> str:
    value, error = metrics[f"{metric},{filtered}"], metrics.get(f"{metric}_stderr,{filtered}")
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _answer_rows(answers: list[dict[str, Any]]) -> Iterable[Row]:
    for kind in KINDS:
        of_kind = [one[kind] for one in answers]
        if of_kind[0]["exact_match"] is not None:
            yield (
                f"{kind} answers, exact match",
                [format_percent(one["exact_match"]) for one in of_kind],
                "",
            )
            yield "  ROUGE-L", [f"{one['rouge_l']:.3f}" for one in of_kind], ""
    if closeness := answers[-1]["closeness"]:
        yield (
            "same most probable token",
            ["-", format_percent(closeness["agreement"])],
            f"on {closeness['text']}",
        )
        yield "overlap, Σ min(p, q)", ["-", f"{closeness['overlap']:.3f}"], ""
        yield "KL(dense ‖ model), nats", ["-", f"{closeness['kl']:.3f}"], ""


def _answer_tables(models: list[dict[str, Any]]) -> Iterator[str]:
    for kind in KINDS if models[0]["answers"] else ():
        yield from (
            "",
            *answers_table(f"{kind} answers", [model["answers"][kind] for model in models]),
        )


def _speed_rows(speeds: list[dict[str, Any]]) -> Iterable[Row]:
    for name in ("prefill", "decode"):
        values = [speed[f"{name}_tokens_per_second"] for speed in speeds]
        ratio = f"{values[1] / values[0]:.2f} times as fast" if len(values) > 1 else ""
        yield f"{name}, tokens/s", [f"{value:,.1f}" for value in values], ratio
    if speeds[0]["peak_bytes"] is not None:
        peaks = [speed["peak_bytes"] / 1e6 for speed in speeds]
        yield "peak memory beyond weights, MB", [f"{peak:,.1f}" for peak in peaks], _less(peaks)


def _less(values: list[Any]) -> str:
    return format_change(*values) if len(values) > 1 and values[0] else ""


def answers_page(result: dict[str, Any]) -> str:
    """Builds one HTML file without server or script from the object of `--json`. All texts are escaped."""
    from jinja2 import Environment

    models = [
        (name, model) for name, model in (("dense", result["dense"]), ("model", result)) if model
    ]
    made = {
        "plan": describe_plan(result["answers_plan"]),
        "tables": "\n".join(_answer_tables([model for _, model in models])).strip(),
        "percent": format_percent,
    }
    page = Environment(autoescape=True, trim_blocks=True).from_string(
        PAGE.read_text(encoding="utf-8")
    )
    return page.render(result=result, models=models, kinds=KINDS, **made) + "\n"


def describe_plan(plan: dict[str, Any]) -> str:
    """Describes how the answers were written, in one line."""
    return (
        f"{plan['name']}: {len(plan['prompts'])} prompts, at most {plan['max_new_tokens']} tokens each; sampled at "
        f"temperature {plan['temperature']}, top_k {plan['top_k']}, seed {plan['seed']}"
    )
