"""The learning rate counts the steps of the run, whether fp16 skipped some or not."""

from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import TrainConfig
from loraprune_ds.zero.engine import learning_rate_factor
from loraprune_ds.zero.loss_scale import optimizer_step

CONFIG = TrainConfig(steps=8, recovery_steps=4, learning_rate=5e-3)


class EngineThatSkips:
    """Steps its schedule as DeepSpeed's engine does: not where the gradients overflowed."""

    def __init__(self, overflows: set[int]) -> None:
        self.optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=CONFIG.learning_rate)
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: learning_rate_factor(CONFIG, 12, step))
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
        optimizer_step(engine, skipped=step in overflows)
    return found


@pytest.mark.parametrize("overflows", [{1}, {1, 2, 3, 4}, {2, 9}])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before")
def test_skipped_steps_count(overflows: set[int]) -> None:
    assert rates(overflows) == rates(set())
    assert rates(overflows)[8:] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
