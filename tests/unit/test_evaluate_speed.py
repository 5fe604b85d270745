"""Models take turns, and a decode step reads one token and the cache of all earlier ones."""

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.evaluate import evaluation
from loraprune_ds.evaluate.evaluation import measure_speed
from loraprune_ds.evaluate.settings import SpeedSettings
from tests.export_cases import CASES, dense_model


class Watched(nn.Module):
    """Writes down its calls. The k-th call takes `seconds[k]` on the fake clock."""

    device = torch.device("cpu")

    def __init__(self, inner: Any, name: str, calls: list[Any], clock: list[float], seconds: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.name, self.calls, self.clock, self.seconds = name, calls, clock, seconds

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        self.calls.append((self.name, input_ids.shape[1], arguments[evaluation.CACHE].get_seq_length()))
        self.clock[0] += next(self.seconds)
        return self.inner(input_ids=input_ids, **arguments)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(evaluation, "_now", lambda: now[0])
    return now


def test_models_take_turns_and_each_token_is_decoded_once(clock: list[float]) -> None:
    calls: list[Any] = []
    models: list[Any] = [
        Watched(dense_model(case), name, calls, clock, count(1, 0)) for name, case in zip("ab", CASES[:2], strict=True)
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
