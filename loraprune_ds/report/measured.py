"""What was measured of a model: the record in report.json and evaluation.json, its readers and its tables."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from loraprune_ds.errors import UserError
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.report.records import REPORT_FILE
from loraprune_ds.units import (
    aligned,
    format_bytes,
    format_change,
    format_count,
    format_percent,
    format_perplexity,
    or_dash,
)


class Measure(NamedTuple):
    """How a number is written, and which one is better. None: a cost, or a metric of one task."""

    write: Callable[[float], str] = "{:.4f}".format
    better: Literal["lower", "higher"] | None = None


MEASURES = {
    "parameters": Measure(format_count),
    "perplexity": Measure(format_perplexity, "lower"),
    "answers that end": Measure(format_percent, "higher"),
    "tokens per second": Measure("{:,.1f}".format),
    "linear parameters": Measure(format_count),
    "weights": Measure(format_bytes),
    "KV cache per token": Measure(format_bytes),
    "accuracy": Measure("{:.4f}".format, "higher"),
    "exact match": Measure("{:.4f}".format, "higher"),
    "repetition": Measure(format_percent, "lower"),
    "empty answers": Measure(format_percent, "lower"),
    # the dense model's perplexity of the answers
    "answer perplexity": Measure(format_perplexity, "lower"),
    "tokens of an answer": Measure("{:.1f}".format),
    "answers that match": Measure(format_percent, "higher"),
    "ROUGE-L": Measure("{:.3f}".format, "higher"),
    "agreement": Measure(format_percent, "higher"),
    "overlap": Measure("{:.3f}".format, "higher"),
}
# Changes of these are told. A perplexity is one of the first things to look at.
CHANGING = {name for name, measure in MEASURES.items() if not measure.better} | {"perplexity"}
OF_TASK = Measure()
ERROR = " ±"  # ends the name of a standard error, which stands behind its value
WORDS = {"", "result", "method", "change"}  # heads of columns that are flush left


@dataclass(frozen=True)
class Value:
    """A number and the dense model's. Numbers compare only if `basis`, a line for readers, is equal."""

    value: float | None  # None: not finite
    dense: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Measured:
    """A model. `removed` is a fraction of the dense model's parameters, None if it is not known."""

    name: str
    method: str | None  # criterion and ranking
    parameters: int
    removed: float | None
    values: dict[str, Value] = field(default_factory=dict)

    def has(self, name: str, basis: str) -> bool:
        return name in self.values and self.values[name].basis == basis

    def add(
        self,
        basis: str,
        values: Mapping[str, float | None],
        dense: Mapping[str, float | None] | None = None,
    ) -> None:
        """Adds numbers by name, without those that are missing."""
        of_dense = dense or {}
        for name, value in values.items():
            if value is not None:
                self.values[name] = Value(_finite(value), _finite(of_dense.get(name)), basis)


READER = TypeAdapter(Measured)


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


def read_measured(results: JsonObject, file: Path) -> Measured:
    """Returns what a report.json or an evaluation has measured."""
    try:
        return READER.validate_python(results["measured"])
    except (KeyError, ValidationError):
        writer = (results.get("versions") or {}).get("commit") or "another version"
        raise UserError(
            f"{file} is no result of this version: {writer} wrote it; compare it there, or measure again"
        ) from None


def read_results(paths: Sequence[Path]) -> list[Measured]:
    """Reads folders of runs and outputs of launch/evaluate.py, and sorts them by size."""
    models: list[Measured] = []
    for path in paths:
        file, name = (path / REPORT_FILE, path.name) if path.is_dir() else (path, path.stem)
        models.append(replace(read_measured(read_json(file), file), name=name))
    return sorted(models, key=lambda model: (model.removed or 0.0, model.name))


def text_basis(text: str, protocol: JsonObject, dtype: str) -> str:
    """Describes what a perplexity was measured on."""
    most = "" if protocol["max_windows"] is None else f"first {protocol['max_windows']} "
    return f"{text}, {most}windows of {protocol['window']}, {dtype}"


def table(measured: Measured, names: Iterable[str]) -> Iterator[str]:
    """Yields a row for each name that was measured, beside the dense model, and a line for each basis."""
    values = measured.values
    shown = [name for name in names if name in values and not name.endswith(ERROR)]
    yield from _aligned(
        [
            ("", shown),
            ("dense", [_cell(values, name, "dense") for name in shown]),
            ("model", [_cell(values, name, "value") for name in shown]),
            ("change", [_change(name, values[name]) for name in shown]),
        ]
    )
    yield from _basis_lines((name, values[name].basis) for name in shown)


def _cell(values: Mapping[str, Value], name: str, side: str) -> str:
    """Writes a number or the dense model's, such as "0.5000 ± 0.0158"."""
    if name not in values:
        return "-"
    number = getattr(values[name], side)
    if number is None:
        return "not finite" if side == "value" else "-"
    error = getattr(values.get(name + ERROR), side, None)
    text = MEASURES.get(name, OF_TASK).write(number)
    return text if error is None else f"{text} ± {error:.4f}"


def _change(name: str, of: Value) -> str:
    return format_change(of.dense, of.value) if name in CHANGING and of.dense and of.value else ""


def _basis_lines(named: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yields a line for each basis, with the names of its values. What is counted has none."""
    by_basis: dict[str, list[str]] = {}
    for name, basis in named:
        by_basis.setdefault(basis, []).append(name)
    for basis, names in by_basis.items():
        if basis:
            yield f"{', '.join(names)}: {basis}"


def qualities(models: Iterable[Measured]) -> dict[tuple[str, str], list[Measured]]:
    """Maps each quality and its basis to the models that compare by it. Those that are not finite do not."""
    found: dict[tuple[str, str], list[Measured]] = {}
    for name, measure in MEASURES.items():
        for model in models:
            of = model.values.get(name)
            if measure.better and of and of.value is not None:
                found.setdefault((name, of.basis), []).append(model)
    return found


def comparison(models: Sequence[Measured]) -> str:
    """Builds a table with a row per model, and two columns for each quality on each basis."""
    columns = [
        ("result", [model.name for model in models]),
        ("method", [model.method or "-" for model in models]),
        ("parameters", [f"{model.parameters:,}" for model in models]),
        ("removed", [or_dash(model.removed, format_percent) for model in models]),
    ]
    by_quality = qualities(models)
    for name, basis in by_quality:
        values = [model.values if model.has(name, basis) else {} for model in models]
        columns.append((name, [_cell(of, name, "value") for of in values]))
        columns.append(("dense", [_cell(of, name, "dense") for of in values]))
    return "\n".join([*_aligned(columns), *_basis_lines(by_quality), ""])


def _aligned(columns: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Yields the lines of a table, without empty columns."""
    shown = [[head, *cells] for head, cells in columns if {*cells} - {"", "-"}]
    sides = "".join("<" if head in WORDS else ">" for head, *_ in shown)
    return aligned(list(zip(*shown, strict=True)), sides)
