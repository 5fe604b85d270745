"""Costs are those of real models. Results become a table for people and an object for programs."""

import json
import math
import re
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from loraprune_ds.evaluate import evaluation
from loraprune_ds.evaluate.answers import Answers, Closeness, Generation, Means
from loraprune_ds.evaluate.evaluation import CACHE, Measurement, Speed, count_cost, measure_speed
from loraprune_ds.evaluate.result import make_result, result_table
from loraprune_ds.evaluate.settings import EvaluationSettings, EvaluationText, SpeedSettings
from loraprune_ds.generate.prompts import AnswerSettings
from loraprune_ds.model.classes import causal_lm_class, config_class
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.perplexity import Perplexity
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.export_cases import CASES, Case, dense_model, exported_config
from tests.support.families import tiny_config
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
    cost=count_cost(SHAPE, SMOLLM, 128, 4),
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
    cost=count_cost(SHAPE.resized([LayerCounts(heads=2, channels=1024)] * 30), SMOLLM, 128, 4),
    perplexity=Perplexity(75.0, 20320, 160),
    speed=Speed(1500.0, 30.0, 1_500_000),
)
WIKITEXT = EvaluationText("wikitext2", "test", "text")
SETTINGS = EvaluationSettings(128, 160, text=WIKITEXT, speed=SpeedSettings())
WINDOW = 24


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.becomes.startswith("pruned")], ids=str
)
def test_macs_parameters_and_cache_are_those_of_the_model(case: Case) -> None:
    exported, _, shape = exported_config(dense_model(case), case)
    model: Any = causal_lm_class(case.becomes)(
        config_class(case.becomes).from_dict(exported.config)
    ).eval()
    input_ids = torch.arange(WINDOW)[None]
    cache: Any = DynamicCache(config=model.config)
    # The math kernel multiplies every pair of positions, so its context is the whole window.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=True, **{CACHE: cache})
    cost = count_cost(shape, exported.config, WINDOW, 4)
    macs = cost.macs_per_token
    counted = counter.get_total_flops() / 2 / WINDOW
    assert counted == macs.linear + macs.head + macs.attention * WINDOW / macs.mean_context
    assert macs.total == macs.linear + macs.attention + macs.head
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.parameters
    if not case.options.get("sliding_window"):  # such a cache forgets
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cost.kv_bytes_per_token * WINDOW == cached


FULL, SLIDING = (1 + 2 + 3 + 4 + 5 + 6) / 6, (1 + 2 + 3 + 4 + 4 + 4) / 6


@pytest.mark.parametrize(
    ("family", "window", "context"),
    [
        ("llama", 4, FULL),  # its class has no window, whatever config.json says
        ("qwen2_moe", 4, FULL),  # its window is off by default
        ("mistral", None, FULL),
        ("mistral", 4, SLIDING),
        ("mistral", 100, FULL),
        ("olmo3", 4, (3 * SLIDING + 1 * FULL) / 4),  # the first layer slides, and has 3 of 4 heads
        ("gpt_oss", 4, (3 * SLIDING + 1 * FULL) / 4),
    ],
)
def test_context_is_the_mean_over_the_window_and_the_heads(
    family: str, window: int | None, context: float
) -> None:
    config = tiny_config(family).to_dict() | {"sliding_window": window}
    dense = shape_from_config(config, family)
    first, second = dense.counts
    shape = dense.resized((LayerCounts({**first, "heads": 3}), LayerCounts({**second, "heads": 1})))
    assert count_cost(shape, config, 6, 4).macs_per_token.mean_context == pytest.approx(context)


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
    assert found["weights, MB"] == ["538.1", "396.5", "26.3 % less"]
    assert found["mean acc"] == ["0.6250"] * 2


def test_answers_have_tables_rows_and_a_line_about_drafts() -> None:
    kinds = {"all": Means(20.0, 0.8, 0.05, 0.0, 1.6), "code": Means(20.0, 0.8, 0.05, 1.0, math.inf)}
    good = Answers(20.0, 0.9, 0.01, 0.0, 2.0, kinds, 0.5, 0.75, [])
    bad = Answers(128.0, 0.1, 0.5, 0.25, 9.0, kinds, 0.0, 0.1, [])
    pruned = replace(
        PRUNED, answers=Generation(False, bad, bad, Closeness("my text", 0.5, 0.625, 1.25, 100))
    )
    dense = replace(DENSE, answers=Generation(True, good, good))
    settings = replace(SETTINGS, answers=AnswerSettings("my.jsonl", "0", ()))
    table = result_table(make_result([pruned, dense], settings, 1, {}))
    found = rows(table)
    greedy, sampled = table[table.index("greedy answers, dense") :].split("\n\n")
    head, total, of_kind, code = [
        line.split("  ") for line in re.sub("  +", "  ", greedy).splitlines()[1:]
    ]
    assert head == ["", "ended", "repetition", "empty", "dense perplexity", "tokens"]
    assert total == [
        "all",
        "90.0 % -> 10.0 %",
        "1.0 % -> 50.0 %",
        "0.0 % -> 25.0 %",
        "2.00 -> 9.00",
        "20.0 -> 128.0",
    ]
    assert of_kind[1:3] == ["80.0 % -> 80.0 %", "5.0 % -> 5.0 %"]
    assert (code[0], code[4]) == ("code", "not finite -> not finite")
    assert sampled.splitlines()[1:] == greedy.splitlines()[1:]
    assert (
        found["greedy answers, exact match"]
        == found["sampled answers, exact match"]
        == ["50.0 %", "0.0 %"]
    )
    assert found["ROUGE-L"] == ["0.750", "0.100"]
    assert found["same most probable token"] == ["-", "50.0 %", "on my text"]
    assert "pays off only below about 1/3 of the dense cost, here 0.74" in table
    assert max(map(len, table.splitlines())) <= 100


def test_measurements_that_were_not_made_have_no_row() -> None:
    bare = replace(PRUNED, perplexity=None, tasks=None, speed=None, removed_fraction=None)
    table = result_table(make_result([bare], EvaluationSettings(), 1, {}))
    assert all(word not in table for word in ("perplexity", "tokens/s", "removed"))
    assert rows(table)["parameters"] == ["99,125,568"]


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
    assert again["speed_plan"] == {"prompt": 512, "generated": 32, "rounds": 5}
    result = make_result([replace(PRUNED, perplexity=None)], EvaluationSettings(), 1, {})
    assert [result[key] for key in ("perplexity", "tokens", "windows", "text", "dense")] == [
        None
    ] * 5


# Speed: models take turns, and a decode step reads one token and the cache of all earlier ones


class Watched(nn.Module):
    """Writes down its calls. The k-th call takes `seconds[k]` on the fake clock."""

    device = torch.device("cpu")

    def __init__(
        self, inner: Any, name: str, calls: list[Any], clock: list[float], seconds: Any
    ) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, seconds

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        self.calls.append(
            (self.name, input_ids.shape[1], arguments[evaluation.CACHE].get_seq_length())
        )
        self.clock[0] += next(self.seconds)
        return self.inner(input_ids=input_ids, **arguments)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(evaluation, "_now", lambda device: now[0])
    return now


def test_models_take_turns_and_each_token_is_decoded_once(clock: list[float]) -> None:
    calls: list[Any] = []
    models: list[Any] = [
        Watched(dense_model(case), name, calls, clock, count(1, 0))
        for name, case in zip("ab", CASES[:2], strict=True)
    ]
    measure_speed(models, SpeedSettings(prompt=7, generated=3, rounds=2))
    turn = [(7, 0), (1, 7), (1, 8), (1, 9)]
    assert calls == [(name, *call) for _ in range(3) for name in "ab" for call in turn]


def test_medians_leave_out_the_warm_up_and_an_outlier(clock: list[float]) -> None:
    rounds = [(100.0, 100.0), (2.0, 0.5), (90.0, 50.0), (4.0, 0.25)]
    seconds = iter([s for prefill, decode in rounds for s in (prefill, decode, decode)])
    model: Any = Watched(dense_model(CASES[0]), "a", [], clock, seconds)
    (found,) = measure_speed([model], SpeedSettings(prompt=8, generated=2, rounds=3))
    assert found.prefill_tokens_per_second == 8 / 4
    assert found.decode_tokens_per_second == 2 / (2 * 0.5)
    assert found.peak_bytes is None
