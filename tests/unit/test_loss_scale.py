"""Overflow: fp16 skips the step, other dtypes stop with a name. The learning rate counts skipped steps."""

import math
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import Dtype, TrainConfig
from loraprune_ds.errors import RunError
from loraprune_ds.zero.engine import learning_rate_factor
from loraprune_ds.zero.optimizer import decide, first_nonfinite, unscale
from loraprune_ds.zero.training_engine import optimizer_step

ALL = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize("dtype", ALL)
def test_finite_gradients_are_scored_and_applied(dtype: Dtype) -> None:
    assert decide([None, None], [1.5, 1e300], dtype=dtype, step=3) == "update"


@pytest.mark.parametrize("bad", [[0, None], [None, 7], [3, 3]])
def test_fp16_skips_a_step_with_an_overflow_on_any_rank(bad: list[int | None]) -> None:
    assert decide(bad, [1.0, 2.0], dtype="float16", step=3) == "skip"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_a_loss_scale_a_bad_gradient_stops_the_run(dtype: Dtype) -> None:
    with pytest.raises(RunError, match=r"^step 12: the LoRA gradient of layer 2 is not finite$"):
        decide([None, 5, 2], [1.0, 1.0, 1.0], dtype=dtype, step=12)
    with pytest.raises(RunError, match="layer 0 is"):  # not taken for "none"
        decide([0], [1.0], dtype=dtype, step=1)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_bad_loss_stops_the_run_in_every_dtype(dtype: Dtype, loss: float) -> None:
    """The loss itself is not scaled, so a lower scale would not help."""
    with pytest.raises(RunError, match=rf"^step 4: the loss is {loss} on rank 1$"):
        decide([3, None], [1.0, loss], dtype=dtype, step=4)
    with pytest.raises(RunError, match=rf"^step 4: the loss is {loss} on rank 1; the weights of layer 2 are not fin"):
        decide([0, 5, 2], [1.0, loss, loss], dtype=dtype, step=4)


def test_first_nonfinite() -> None:
    fine, nan, inf = torch.ones(3), torch.tensor([1.0, math.nan]), torch.tensor([[-math.inf]])
    assert first_nonfinite([fine, fine[:0]]) is None
    assert first_nonfinite([fine, nan, inf]) == 1
    assert first_nonfinite([inf, nan]) == 0


def test_unscale_gives_the_gradient_of_the_unscaled_loss() -> None:
    gradient = torch.tensor([6.0 * 4096, -4.0 * 4096])
    assert unscale(gradient, 4096.0).tolist() == [6.0, -4.0]
    assert gradient.tolist() == [6.0 * 4096, -4.0 * 4096]  # the optimizer divides it itself
    assert unscale(gradient, 1.0) is gradient


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


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before")
def test_the_learning_rate_counts_skipped_steps() -> None:
    assert rates({1, 2, 3, 9}) == rates(set())
    assert rates(set())[8:] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
