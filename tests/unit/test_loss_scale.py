"""Overflow: a loss scaler skips the step, without one a line names it. The learning rate counts skipped steps."""

import math
from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import TrainConfig
from loraprune_ds.session.exchange import can_update
from loraprune_ds.train.optimizer import learning_rate_factor
from loraprune_ds.zero.engine import ShardedEngine
from loraprune_ds.zero.sharded import ShardedModel
from tests.support.refusals import must_name

BOTH = (True, False)
FINE = [1.0, 2.0, 1e300]


@pytest.mark.parametrize(
    ("scalers", "bad", "losses", "expected"),
    [
        (BOTH, [None, None, None], FINE, True),
        ([True], [0, None, None], FINE, False),
        ([True], [None, 7, None], FINE, False),
        ([False], [None, 5, 2], FINE, "step 3 layer 2"),
        ([False], [0, None, None], FINE, "step 3 layer 0"),
        # The loss itself is not scaled, so a lower scale would not help.
        (BOTH, [3, None, None], [1.0, math.nan, 1.0], "step 3 nan rank 1"),
        (BOTH, [0, 5, 2], [1.0, math.inf, math.inf], "step 3 inf rank 1 layer 2"),
    ],
)
def test_how_a_step_ends(
    scalers: Iterable[bool], bad: list[int | None], losses: list[float], expected: bool | str
) -> None:
    for skips in scalers:
        if isinstance(expected, bool):
            assert can_update(bad, losses, skips=skips, step=3) == expected
        else:
            must_name(expected, can_update, bad, losses, skips=skips, step=3)


CONFIG = TrainConfig(steps=8, recovery_steps=4, learning_rate=5e-3)


class EngineThatSkips:
    """Steps its schedule as DeepSpeed's engine does: not where the gradients overflowed."""

    def __init__(self, overflows: set[int]) -> None:
        self.optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=CONFIG.learning_rate)
        self.lr_scheduler = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(CONFIG, [8, 4], step)
        )
        self.overflows = overflows
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps not in self.overflows:
            self.optimizer.step()
            self.lr_scheduler.step()


def rates(overflows: set[int]) -> list[float]:
    engine: Any = EngineThatSkips(overflows)
    found = []
    for step in range(1, 13):
        found.append(engine.optimizer.param_groups[0]["lr"])
        ShardedEngine.update(Mock(deepspeed=engine), skipped=step in overflows)
    return found


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before")
def test_the_learning_rate_counts_skipped_steps() -> None:
    assert rates({1, 2, 3, 9}) == rates(set())
    assert rates(set())[8:] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])


def test_a_resumed_run_has_the_scale_that_overflows_left() -> None:
    def model() -> Any:
        scaler = DynamicLossScaler(
            2**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
        return Mock(skips_updates=True, zero_optimizer=Mock(loss_scaler=scaler))

    straight, resumed = model(), model()
    # two overflows, of which the first is tolerated, and a step
    vars(straight.zero_optimizer.loss_scaler).update(
        cur_scale=2.0**15, cur_iter=3, last_overflow_iter=1, cur_hysteresis=1
    )
    saved = ShardedModel.scaler_state(straight)
    assert saved != ShardedModel.scaler_state(resumed)
    ShardedModel.restore_scaler(resumed, saved)
    assert saved == ShardedModel.scaler_state(resumed)


def test_a_resumed_run_counts_on() -> None:
    resumed = object.__new__(ShardedEngine)
    resumed.deepspeed = Mock(gradient_accumulation_steps=lambda: 2, train_batch_size=lambda: 8)
    resumed.lr_scheduler = EngineThatSkips(set()).lr_scheduler
    resumed.restore_counters(3, resumed.lr_scheduler.state_dict())
    counts = resumed.deepspeed
    assert (counts.global_steps, counts.micro_steps, counts.global_samples) == (3, 6, 24)
