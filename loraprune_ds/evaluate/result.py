"""The result of an evaluation: JSON for launch/compare.py, a table, and a page with the answers. Needs no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from loraprune_ds.evaluate.settings import GYM, EvaluationSettings
from loraprune_ds.files import JsonObject
from loraprune_ds.report.measured import ERROR, MEASURES, Measured, read_measured, table, text_basis
from loraprune_ds.units import aligned, format_percent, or_dash

if TYPE_CHECKING:
    from loraprune_ds.evaluate.evaluation import Measurement

Values = dict[str, float | None]
KINDS = ("greedy", "sampled")
FACTS = ("kind", "method", "model_type", "dtype")  # of a model, in the first lines
# of answers. Those that show a model which no longer answers come first
OF_ANSWERS = {
    "ended": "answers that end",
    "repetition": "repetition",
    "empty": "empty answers",
    "dense_perplexity": "answer perplexity",
    "tokens": "tokens of an answer",
    "exact_match": "answers that match",
    "rouge_l": "ROUGE-L",
}
# its columns become rows if two do not fit, as on a phone
PAGE = Path(__file__).with_name("answers.html")


def make_result(
    measurements: "list[Measurement]",
    settings: EvaluationSettings,
    world_size: int,
    provenance: JsonObject,
) -> JsonObject:
    """Builds the object of `--json`: the first model's values, the second's under `dense`, settings, provenance."""
    model, *others = map(_model_entries, measurements)
    text = settings.text
    result = {
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
    return result | {"measured": asdict(_measured(result))}


def _measured(result: JsonObject) -> Measured:
    dense = result["dense"]
    measured = Measured(
        result["path"], result["method"], result["cost"]["parameters"], result["removed_fraction"]
    )

    def add(basis: str, values_of: Callable[[JsonObject], Values]) -> None:
        measured.add(basis, values_of(result), dense and values_of(dense))

    add("", _costs)
    if text := result["text"]:
        name = f"{text['name']} {text['split'] or ''}".rstrip()
        basis = text_basis(name, result["protocol"], result["dtype"])
        add(basis, lambda model: {"perplexity": model["perplexity"]})
    if tasks := result["tasks"]:
        add(_basis_of_tasks(tasks), lambda model: _task_values(model["tasks"]["results"]))
    if answers := result["answers"]:
        plan = result["answers_plan"]
        basis = f"greedy answers to {plan['name']} ({plan['sha256'][:8]}), at most {plan['max_new_tokens']} tokens"
        add(basis, lambda model: _answer_values(model["answers"]["greedy"]))
        basis = f"{plan['name']}, equally many tokens after each prompt, both models by turns"
        add(basis, lambda model: {"tokens per second": model["answers"]["tokens_per_second"]})
        if close := answers["closeness"]:
            basis = f"{close['text']}, {close['predictions']:,} predictions"
            measured.add(basis, {name: close[name] for name in ("agreement", "overlap", "kl")})
    return measured


def _costs(model: JsonObject) -> Values:
    cost = model["cost"]
    return {
        "parameters": cost["parameters"],
        "linear parameters": cost["linear_parameters"],
        "weights": cost["weight_bytes"],
        "KV cache per token": cost["kv_bytes_per_token"],
    }


def _basis_of_tasks(tasks: JsonObject) -> str:
    settings = tasks["settings"]
    counts = {**settings.get("documents", {}), **settings.get(GYM, {}).get("documents", {})}
    return ", ".join(f"{task} ({count})" for task, count in counts.items())


def _task_values(results: JsonObject) -> Values:
    """Returns every metric of every task, and the means over tasks."""
    values: Values = {}
    means: dict[str, list[float]] = {"acc": [], "exact_match": []}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")  # such as "acc,none"
            if not filter_name or not isinstance(value, int | float):
                continue
            name = f"{task} {metric.removesuffix('_stderr')}"
            if filter_name != "none":
                name += f" ({filter_name})"
            values[name + ERROR if metric.endswith("_stderr") else name] = value
            if filter_name == "none" and metric in means:
                means[metric].append(value)
    for name, found in zip(("accuracy", "exact match"), means.values(), strict=True):
        values[name] = fmean(found) if found else None
    return values


def _answer_values(answers: JsonObject) -> Values:
    return {name: answers[key] for key, name in OF_ANSWERS.items() if key in answers}


def _model_entries(model: "Measurement") -> JsonObject:
    entries = asdict(model)
    perplexity = entries.pop("perplexity") or {"perplexity": None, "tokens": None, "windows": None}
    return perplexity | entries


def result_table(result: JsonObject) -> str:
    """Builds plain text. The dense model is on the left."""
    measured = read_measured(result, Path(result["path"]))
    lines: list[str] = []
    for name, model in _models(result):
        facts = ", ".join(filter(None, map(model.get, FACTS)))
        lines.append(f"{name:<6} {model['path']} ({facts})")
        if model["answers"] and not model["answers"]["chat_template"]:
            lines.append("       It has no chat template: it continues the prompts as plain text")
    lines += ["", *table(measured, measured.values)]
    lines += _answer_tables([model for _, model in _models(result)])
    return "\n".join(lines) + "\n"


def _models(result: JsonObject) -> list[tuple[str, JsonObject]]:
    """Returns the measured models in the order of columns."""
    pruned = ("model", result)
    return [("dense", result["dense"]), pruned] if result["dense"] else [pruned]


def answers_table(title: str, answers: list[JsonObject]) -> Iterator[str]:
    """Yields the lines of a table, with a row for all answers and one for each kind of prompt.

    Args:
        answers: the dense model's (optional), then the pruned model's, as in `--json`.
    """
    first = _answer_values(answers[0])
    names = [name for name, value in first.items() if value is not None]
    rows = [["", *names], _answers_row("all", names, answers)]
    for kind in answers[0]["by_kind"]:
        of_kind = [model["by_kind"][kind] for model in answers]
        rows.append(_answers_row(kind, names, of_kind))
    yield f"{title}, dense -> pruned" if len(answers) > 1 else title
    yield from aligned(rows, "<" + ">" * len(names))


def _answers_row(kind: str, names: list[str], answers: list[JsonObject]) -> list[str]:
    """Returns a row such as ["all", "100.0 % -> 87.5 %", "1.2 % -> 9.0 %"]."""
    values = list(map(_answer_values, answers))
    row = [kind]
    for name in names:
        cells = [or_dash(of.get(name), MEASURES[name].write) for of in values]
        row.append(" -> ".join(cells))
    return row


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
