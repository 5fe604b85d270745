"""Costs are those of real models. Results become a table for people and an object for programs."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraprune_ds.evaluate.answers import Answers, Closeness, Generation, Means
from loraprune_ds.evaluate.evaluation import Measurement, count_cost
from loraprune_ds.evaluate.result import make_result, result_table
from loraprune_ds.evaluate.settings import EvaluationSettings, EvaluationText
from loraprune_ds.generate.prompts import AnswerSettings
from loraprune_ds.model.classes import causal_lm_class, config_class
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.perplexity import Perplexity
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.export_cases import CASES, Case, dense_model, exported_config
from tests.support.published import sizes_of

SMOLLM = sizes_of("llama", 576, 1536, 30, 9, num_key_value_heads=3, head_dim=64, vocab_size=49152)
SMOLLM |= {"tie_word_embeddings": True}
SHAPE = shape_from_config(SMOLLM, "SmolLM2-135M")
TASKS = {
    "results": {
        "boolq": {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.0123},
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.5,
            "acc_stderr,none": "N/A",
            "acc_norm,strict": 0.25,
        },
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
    cost=count_cost(SHAPE, 4),
    perplexity=Perplexity(50.0, 20320, 160),
    tasks=TASKS,
)
PRUNED = replace(
    DENSE,
    path="runs/a",
    kind="run",
    method="lora, uniform",
    removed_fraction=0.25,
    cost=count_cost(SHAPE.resized([LayerCounts(heads=2, channels=1024)] * 30), 4),
    perplexity=Perplexity(75.0, 20320, 160),
)
WIKITEXT = EvaluationText("wikitext2", "test", "text")
SETTINGS = EvaluationSettings(128, 160, text=WIKITEXT)
WINDOW = 24


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.becomes.startswith("pruned")], ids=str
)
def test_parameters_and_cache_are_those_of_the_model(case: Case) -> None:
    exported, _, shape = exported_config(dense_model(case), case)
    model: Any = causal_lm_class(case.becomes)(
        config_class(case.becomes).from_dict(exported.config)
    ).eval()
    cost = count_cost(shape, 4)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.parameters
    if not case.options.get("sliding_window"):  # such a cache forgets
        with torch.no_grad():
            cache = model(input_ids=torch.arange(WINDOW)[None], use_cache=True).past_key_values
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cost.kv_bytes_per_token * WINDOW == cached


def rows(table: str) -> dict[str, list[str]]:
    """Returns name -> the rest of the row, split at two or more spaces."""
    found = {}
    for line in filter(None, map(str.strip, table.splitlines())):
        name, *cells = (cell.strip() for cell in line.split("  ") if cell.strip())
        found[name] = cells
    return found


def test_models_are_compared_with_the_dense_one() -> None:
    found = rows(result_table(make_result([PRUNED, DENSE], SETTINGS, 2, {})))
    assert found["perplexity"] == ["50.00", "75.00", "50.0 % more"]
    assert found["linear parameters"] == ["106.2 M", "70.8 M", "33.3 % less"]
    assert found["weights"] == ["538.1 MB", "396.5 MB", "26.3 % less"]
    assert found["accuracy"] == ["0.6250"] * 2
    assert found["boolq acc"] == ["0.7500 ± 0.0123"] * 2
    assert found["piqa acc"] == ["0.5000"] * 2
    assert found["piqa acc_norm (strict)"] == ["0.2500"] * 2


def test_answers_have_tables_and_rows() -> None:
    kinds = {"all": Means(20.0, 0.8, 0.05, 0.0, 1.6), "code": Means(20.0, 0.8, 0.05, 1.0, math.inf)}
    good = Answers(20.0, 0.9, 0.01, 0.0, 2.0, kinds, 0.5, 0.75, [])
    bad = Answers(128.0, 0.1, 0.5, 0.25, 9.0, kinds, 0.0, 0.1, [])
    pruned = replace(
        PRUNED,
        answers=Generation(False, bad, bad, 60.0, Closeness("my text", 0.5, 0.625, 1.25, 100)),
    )
    dense = replace(DENSE, answers=Generation(True, good, good, 40.0))
    settings = replace(SETTINGS, answers=AnswerSettings("my.jsonl", "0", ()))
    table = result_table(make_result([pruned, dense], settings, 1, {}))
    found = rows(table)
    assert table.count("90.0 % -> 10.0 %") == 2
    assert found["tokens per second"] == ["40.0", "60.0", "50.0 % more"]
    assert found["answers that match"] == ["50.0 %", "0.0 %"]
    assert found["ROUGE-L"] == ["0.750", "0.100"]
    assert found["agreement"] == ["-", "50.0 %"]
    assert found["agreement, overlap, kl: my text, 100 predictions"] == []


def test_measurements_that_were_not_made_have_no_row() -> None:
    bare = replace(PRUNED, perplexity=None, tasks=None, removed_fraction=None)
    table = result_table(make_result([bare], EvaluationSettings(), 1, {}))
    assert all(word not in table for word in ("perplexity", "removed"))
    assert rows(table)["parameters"] == ["99.1 M"]


@pytest.mark.parametrize(
    ("value", "shown"), [(math.nan, "not finite"), (math.exp(700), "1.01e+304")]
)
def test_a_broken_model_is_told_as_such(value: float, shown: str) -> None:
    broken = replace(PRUNED, perplexity=Perplexity(value, 20320, 160))
    assert rows(result_table(make_result([broken], SETTINGS, 1, {})))["perplexity"] == [shown]


def test_the_object_has_the_first_models_values_on_top() -> None:
    result = make_result([PRUNED, DENSE], SETTINGS, 2, {"versions": {"torch": "2"}})
    again = json.loads(json.dumps(result, allow_nan=False))
    assert (again["perplexity"], again["tokens"], again["windows"]) == (75.0, 20320, 160)
    assert (again["dense"]["perplexity"], again["removed_fraction"]) == (50.0, 0.25)
    assert again["protocol"] == {"window": 128, "max_windows": 160}
    assert again["text"]["split"] == "test"
    assert (again["world_size"], again["batch_size"], again["versions"]) == (2, 16, {"torch": "2"})
    result = make_result([replace(PRUNED, perplexity=None)], EvaluationSettings(), 1, {})
    assert [result[key] for key in ("perplexity", "tokens", "windows", "text", "dense")] == [
        None
    ] * 5
