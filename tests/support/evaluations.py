"""What is measured: a record as in report.json, and an evaluation's JSON."""

from dataclasses import asdict
from typing import Any

from loraprune_ds.report.measured import Measured, Value

HELD_OUT = "a held-out 10 % of embedded, first 64 windows of 128, bfloat16"


def measured_of(name: str, removed: float = 0.25, **values: Value) -> dict[str, Any]:
    """Returns a record. A `_` in the name of a value stands for a space."""
    named = {key.replace("_", " "): value for key, value in values.items()}
    return asdict(Measured(name, "lora, uniform", round(1000 * (1 - removed)), removed, named))


EVALUATION = {
    "perplexity": 60.0,
    "method": None,
    "dtype": "float32",
    "tasks": None,
    "answers": None,
    "dense": {"perplexity": 50.0, "tasks": None, "answers": None},
    "text": {"name": "wikitext2", "split": "test", "sha256": "0"},
    "protocol": {"window": 128, "max_windows": None},
    "measured": measured_of(
        "runs/a",
        perplexity=Value(60.0, 50.0, "wikitext2 test, windows of 128, float32"),
        accuracy=Value(0.6, 0.8, "piqa, boolq"),
        piqa_acc=Value(0.5, 0.8, "piqa, boolq"),
    )
    | {"method": None},
}
