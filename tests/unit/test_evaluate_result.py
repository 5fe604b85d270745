"""Results become a table for people and an object for programs. Wrong settings are refused."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.cost import count_cost
from loraprune_ds.evaluate.evaluation import Measurement
from loraprune_ds.evaluate.evaluation_text import EvaluationText
from loraprune_ds.evaluate.perplexity import Perplexity, PerplexityProtocol
from loraprune_ds.evaluate.result import make_result, result_table
from loraprune_ds.evaluate.serving import Served
from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.evaluate.speed import Speed
from loraprune_ds.evaluate.speed_settings import SpeedSettings
from loraprune_ds.evaluate.zeroshot import TaskSettings
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.read_shape import shape_from_config

SMOLLM: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SHAPE = shape_from_config(SMOLLM, "SmolLM2-135M")
TASKS = {
    "results": {
        "boolq": {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.0123},
        "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,strict": 0.25},
    },
    "settings": {},
}
DENSE = Measurement(
    path="embedded",
    kind="checkpoint",
    method=None,
    model_type="llama",
    dtype="float32",
    removed_fraction=0.0,
    cost=count_cost(SHAPE, 128, None, 4),
    perplexity=Perplexity(50.0, 20320, 160),
    tasks=TASKS,
    speed=Speed(1000.0, 20.0, 3_000_000),
)
PRUNED = replace(
    DENSE,
    path="runs/a",
    kind="run",
    method="lora, uniform",
    removed_fraction=0.25,
    cost=count_cost(SHAPE.with_layers((LayerShape(heads=2, channels=1024),) * 30), 128, None, 4),
    perplexity=Perplexity(75.0, 20320, 160),
    speed=Speed(1500.0, 30.0, 1_500_000),
)
SETTINGS = EvaluationSettings(
    PerplexityProtocol(128, None, 160), text=EvaluationText("wikitext2", "test", "text"), speed=SpeedSettings()
)


def rows(table: str) -> dict[str, list[str]]:
    """Returns name -> the rest of the row, split at two or more spaces."""
    found = {}
    for line in filter(None, map(str.strip, table.splitlines())):
        name, *cells = (cell.strip() for cell in line.split("  ") if cell.strip())
        found[name] = cells
    return found


def test_models_are_compared_with_the_dense_one() -> None:
    found = rows(result_table(make_result([PRUNED, DENSE], SETTINGS, 2, {})))
    assert found["perplexity"] == ["50.000", "75.000", "1.500 times"]
    assert found["prefill, tokens/s"] == ["1,000.0", "1,500.0", "1.50 times as fast"]
    assert found["in the layers' linears"] == ["106,168,320", "70,778,880", "33.3 % less"]
    assert found["mean acc"] == ["0.6250"] * 2


def test_what_a_server_measured_is_kept() -> None:
    served = Served("llama.cpp", "0.3.36", "gguf-q8_0", 100.0, 10.0, None)
    result = make_result([replace(PRUNED, speed=None, served=served)], SETTINGS, 1, {})
    assert result["served"]["prefill_tokens_per_second"] == 100.0
    assert "batch, tokens/s" not in result_table(result)


def test_what_was_not_measured_has_no_row() -> None:
    bare = replace(PRUNED, perplexity=None, tasks=None, speed=None, removed_fraction=None)
    table = result_table(make_result([bare], EvaluationSettings(PerplexityProtocol()), 1, {}))
    assert "perplexity" not in table
    assert "tokens/s" not in table
    assert "removed" not in table
    assert rows(table)["parameters"] == ["99,125,568"]


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "not finite"), (math.exp(700), "1.01e+304")])
def test_a_broken_model_is_told_as_such(value: float, shown: str) -> None:
    broken = replace(PRUNED, perplexity=Perplexity(value, 20320, 160))
    assert rows(result_table(make_result([broken], SETTINGS, 1, {})))["perplexity"] == [shown]


def test_the_object_has_the_first_models_values_on_top() -> None:
    result = make_result([PRUNED, DENSE], SETTINGS, 2, {"versions": {"torch": "2"}})
    again = json.loads(json.dumps(result, allow_nan=False))
    assert (again["perplexity"], again["tokens"], again["windows"]) == (75.0, 20320, 160)
    assert (again["dense"]["perplexity"], again["removed_fraction"]) == (50.0, 0.25)
    assert again["protocol"] == {"window": 128, "stride": None, "max_windows": 160}
    assert again["text"]["split"] == "test"
    assert (again["world_size"], again["batch_size"], again["versions"]) == (2, 16, {"torch": "2"})
    assert again["speed_plan"] == {"prompt": 512, "generated": 32, "rounds": 5}


def test_an_object_without_a_text_says_so() -> None:
    result = make_result([replace(PRUNED, perplexity=None)], EvaluationSettings(PerplexityProtocol()), 1, {})
    assert [result[key] for key in ("perplexity", "tokens", "windows", "text", "dense")] == [None] * 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PerplexityProtocol(window=1), "--window must be at least 2 tokens; got 1"),
        (
            lambda: PerplexityProtocol(128, stride=128),
            "--sliding must be from 1 to one less than --window 128; got 128",
        ),
        (lambda: PerplexityProtocol(128, stride=0), "--sliding must be from 1 to one less than --window 128; got 0"),
        (lambda: PerplexityProtocol(max_windows=0), "--max-windows must be at least 1; got 0"),
        (lambda: EvaluationSettings(PerplexityProtocol(), batch_size=0), "--batch-size must be at least 1; got 0"),
        (
            lambda: EvaluationSettings(PerplexityProtocol(), tasks=TaskSettings(("piqa",)), sharded=True),
            "--sharded measures perplexity only; --tasks, --speed and --serve need the whole model",
        ),
    ],
)
def test_wrong_numbers_name_their_option(make: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(("window", "expected"), [(2, 1024), (128, 16), (2048, 1), (4096, 1)])
def test_a_batch_is_about_two_thousand_tokens(window: int, expected: int) -> None:
    assert EvaluationSettings(PerplexityProtocol(window)).actual_batch_size == expected
    assert EvaluationSettings(PerplexityProtocol(window), batch_size=3).actual_batch_size == 3
