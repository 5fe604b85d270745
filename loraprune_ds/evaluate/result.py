"""The result of an evaluation: JSON for launch/compare.py, a table, and a page with the answers.

And the numbers by which models compare, read from that JSON or from a run's. Needs no torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.files import JsonObject
from loraprune_ds.units import aligned, format_change, format_percent, format_perplexity

if TYPE_CHECKING:
    from loraprune_ds.evaluate.evaluation import Measurement

Row = tuple[str, list[str], str]  # name, one cell per column, remark
NamedModel = tuple[str, JsonObject]  # its column, and its part of the result
KINDS = ("greedy", "sampled")
FACTS = ("kind", "method", "model_type", "dtype")  # of a model, in the first lines
# its columns become rows if two do not fit, as on a phone
PAGE = Path(__file__).with_name("answers.html")


@dataclass(frozen=True)
class Measure:
    """A number to compare models by, and its form in the table and in the picture."""

    cell: Callable[[float], str]
    label: Callable[[float], str]
    better: Literal["lower", "higher"] = "higher"


def _perplexity_label(value: float) -> str:
    return f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


MEASURES = {
    "perplexity": Measure(format_perplexity, _perplexity_label, "lower"),
    "accuracy": Measure("{:.4f}".format, "{:.3f}".format),
    "exact match": Measure("{:.4f}".format, "{:.3f}".format),
    "ended": Measure(format_percent, format_percent),
    "repetition": Measure(format_percent, format_percent, "lower"),
    "empty": Measure(format_percent, format_percent, "lower"),
    # the dense model's perplexity of the answers
    "answer perplexity": Measure(format_perplexity, "{:.2f}".format, "lower"),
    "agreement": Measure(format_percent, format_percent),
    "overlap": Measure("{:.3f}".format, "{:.3f}".format),
}
# A measure of answers -> its form in the table. Those that show a model which no longer answers come first.
ANSWER_MEASURES: dict[str, Callable[[float], str]] = {
    "ended": format_percent,
    "repetition": format_percent,
    "empty": format_percent,
    "dense_perplexity": format_perplexity,
    "tokens": "{:.1f}".format,
}


def mean_metric(tasks: JsonObject, metric: str) -> float | None:
    """Returns the mean over the tasks with a metric, such as "acc" or "exact_match". None without such tasks."""
    values = [tasks["results"][name][f"{metric},none"] for name in tasks_with(tasks, metric)]
    return sum(values) / len(values) if values else None


def tasks_with(tasks: JsonObject, metric: str) -> list[str]:
    return [name for name, metrics in tasks["results"].items() if f"{metric},none" in metrics]


def answers_table(title: str, answers: list[JsonObject]) -> Iterator[str]:
    """Yields the lines of a table, with a row for all answers and one for each kind of prompt.

    Args:
        answers: the dense model's (optional), then the pruned model's, as in `--json`. Older files lack some measures.
    """
    first = answers[0]
    keys = [key for key in ANSWER_MEASURES if first.get(key) is not None]
    head = [key.replace("_", " ") for key in keys]
    rows = [["", *head], _answers_row("all", keys, answers)]
    for kind in first.get("by_kind", ()):
        of_kind = [model["by_kind"][kind] for model in answers]
        rows.append(_answers_row(kind, keys, of_kind))
    if len(answers) > 1:
        title += ", dense -> pruned"
    yield title
    yield from aligned(rows, "<" + ">" * len(keys))


def _answers_row(name: str, keys: list[str], answers: list[JsonObject]) -> list[str]:
    """Returns a row such as ["all", "100.0 % -> 87.5 %", "1.2 % -> 9.0 %"]."""
    row = [name]
    for key in keys:
        cell = ANSWER_MEASURES[key]
        row.append(" -> ".join(cell(model[key]) for model in answers))
    return row


def make_result(
    measurements: "list[Measurement]",
    settings: EvaluationSettings,
    world_size: int,
    provenance: JsonObject,
) -> JsonObject:
    """Builds the object of `--json`: the first model's values, the second's under `dense`, settings, provenance."""
    model, *others = map(_model_entries, measurements)
    text = settings.text
    return {
        **model,
        "dense": others[0] if others else None,
        "text": text and {"name": text.name, "split": text.split, "sha256": text.sha256},
        "protocol": {"window": settings.window, "max_windows": settings.max_windows},
        "batch_size": settings.actual_batch_size,
        "world_size": world_size,
        "sharded": settings.sharded,
        "answers_plan": settings.answers and asdict(settings.answers),
        **provenance,
    }


def _model_entries(model: "Measurement") -> JsonObject:
    entries = asdict(model)
    perplexity = entries.pop("perplexity") or {"perplexity": None, "tokens": None, "windows": None}
    return perplexity | entries


def result_table(result: JsonObject) -> str:
    """Builds plain text of about 100 columns at most. The dense model is on the left."""
    names, models = zip(*_models(result), strict=True)
    cells = [("", *names, "")]
    for name, values, remark in _rows(models):
        cells.append((name, *values, remark))
    sides = "<" + ">" * len(models) + "<"
    lines = [*_heading(result), *_answer_lines(result), ""]
    lines += aligned(cells, sides)
    lines += _answer_tables(models)
    return "\n".join(lines) + "\n"


def _models(result: JsonObject) -> list[NamedModel]:
    """Returns the measured models in the order of columns."""
    pruned = ("model", result)
    return [("dense", result["dense"]), pruned] if result["dense"] else [pruned]


def _heading(result: JsonObject) -> Iterator[str]:
    for name, model in _models(result):
        facts = ", ".join(filter(None, map(model.get, FACTS)))
        yield f"{name:<6} {model['path']} ({facts})"
    text = result["text"]
    if text:
        text_name = text["name"]
        if text["split"]:
            text_name += f", split {text['split']}"
        window = result["protocol"]["window"]
        windows = f"{result['windows']:,} windows of {window} tokens"
        yield f"text   {text_name}: {windows}, {result['tokens']:,} predictions"


def _answer_lines(result: JsonObject) -> Iterator[str]:
    if result["answers"] is None:
        return
    yield f"answers {describe_plan(result['answers_plan'])}"
    for _, model in _models(result):
        if not model["answers"]["chat_template"]:
            yield f"        {model['path']} has no chat template: it continues the prompts as plain text"


def _rows(models: Sequence[JsonObject]) -> Iterator[Row]:
    yield from _size_rows(models)
    for key, rows in (
        ("perplexity", _perplexity_rows),
        ("tasks", _task_rows),
        ("answers", _answer_rows),
    ):
        if models[0][key] is not None:
            yield from rows([model[key] for model in models])


def _size_rows(models: Sequence[JsonObject]) -> Iterator[Row]:
    costs = [model["cost"] for model in models]
    parameters = [f"{cost['parameters']:,}" for cost in costs]
    removed = models[-1]["removed_fraction"]
    remark = "" if removed is None else f"{format_percent(removed)} removed"
    yield "parameters", parameters, remark
    linears = [cost["linear_parameters"] for cost in costs]
    yield _cost_row("  in the layers' linears", linears, ",")
    weights = [cost["weight_bytes"] / 1e6 for cost in costs]
    yield _cost_row("weights, MB", weights)
    cache = [cost["kv_bytes_per_token"] / 1e3 for cost in costs]
    yield _cost_row("key-value cache per token, kB", cache)


def _cost_row(name: str, values: list[float], form: str = ",.1f") -> Row:
    """Returns a row whose remark is the change, such as "25.0 % less"."""
    remark = format_change(*values) if len(values) > 1 and values[0] else ""
    return name, [format(value, form) for value in values], remark


def _perplexity_rows(values: list[float]) -> Iterator[Row]:
    ratio = ""
    if len(values) > 1 and all(map(math.isfinite, values)):
        ratio = f"{values[1] / values[0]:.3f} times"
    yield "perplexity", [format_perplexity(value, 3) for value in values], ratio


def _task_rows(tasks: list[JsonObject]) -> Iterator[Row]:
    """Yields every metric of every task, with the standard error of lm-eval."""
    first = tasks[0]["results"]
    for task, metrics in first.items():
        for key in metrics:
            metric, _, filter_name = key.partition(",")  # such as "acc,none"
            if filter_name and not metric.endswith("_stderr"):
                suffix = "" if filter_name == "none" else f" ({filter_name})"
                cells = [_metric(model["results"][task], metric, filter_name) for model in tasks]
                yield f"{task} {metric}{suffix}", cells, ""
    for metric in ("acc", "exact_match"):
        if len(tasks_with(tasks[0], metric)) > 1:
            means = [mean_metric(model, metric) for model in tasks]
            yield f"mean {metric}", [f"{mean:.4f}" for mean in means], ""


def _metric(metrics: JsonObject, metric: str, filter_name: str) -> str:
    """Writes a metric such as "0.5000 ± 0.0158"."""
    value = f"{metrics[f'{metric},{filter_name}']:.4f}"
    error = metrics.get(f"{metric}_stderr,{filter_name}")
    return f"{value} ± {error:.4f}" if isinstance(error, float) else value


def _answer_rows(answers: list[JsonObject]) -> Iterator[Row]:
    for kind in KINDS:
        of_kind = [model[kind] for model in answers]
        if of_kind[0]["exact_match"] is not None:
            matches = [format_percent(model["exact_match"]) for model in of_kind]
            yield f"{kind} answers, exact match", matches, ""
            yield "  ROUGE-L", [f"{model['rouge_l']:.3f}" for model in of_kind], ""
    closeness = answers[-1]["closeness"]
    if closeness:
        agreement = format_percent(closeness["agreement"])
        yield "same most probable token", ["-", agreement], f"on {closeness['text']}"
        yield "overlap, Σ min(p, q)", ["-", f"{closeness['overlap']:.3f}"], ""
        yield "KL(dense ‖ model), nats", ["-", f"{closeness['kl']:.3f}"], ""


def _answer_tables(models: Sequence[JsonObject]) -> Iterator[str]:
    if not models[0]["answers"]:
        return
    for kind in KINDS:
        yield ""
        yield from answers_table(f"{kind} answers", [model["answers"][kind] for model in models])


def answers_page(result: JsonObject) -> str:
    """Builds one HTML file without server or script from the object of `--json`. All texts are escaped."""
    from jinja2 import Environment

    models = _models(result)
    tables = "\n".join(_answer_tables([model for _, model in models])).strip()
    environment = Environment(autoescape=True, trim_blocks=True)
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    text = page.render(
        result=result,
        models=models,
        kinds=KINDS,
        plan=describe_plan(result["answers_plan"]),
        tables=tables,
        percent=format_percent,
    )
    return text + "\n"


def describe_plan(plan: JsonObject) -> str:
    """Describes how the answers were written, in one line."""
    return (
        f"{plan['name']}: {len(plan['prompts'])} prompts, at most {plan['max_new_tokens']} tokens each; sampled at "
        f"temperature {plan['temperature']}, top_k {plan['top_k']}, seed {plan['seed']}"
    )
