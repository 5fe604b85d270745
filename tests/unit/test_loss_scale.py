"""Handling of overflow as pure functions. fp16 skips the step, other dtypes stop with a name."""

import math

import pytest
import torch

from loraprune_ds.config import Dtype
from loraprune_ds.errors import RunError
from loraprune_ds.zero.loss_scale import decide, first_nonfinite, unscale

ALL = ("float16", "bfloat16", "float32")


@pytest.mark.parametrize("dtype", ALL)
def test_finite_gradients_are_scored_and_applied(dtype: Dtype) -> None:
    assert decide([None, None], [1.5, 1e300], dtype=dtype, step=3) == "update"


def test_fp16_skips_the_step_wherever_the_overflow_is() -> None:
    cases: list[list[int | None]] = [[0, None], [None, 7], [3, 3]]
    for bad in cases:
        assert decide(bad, [1.0, 2.0], dtype="float16", step=3) == "skip"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_a_loss_scale_a_bad_gradient_stops_the_run(dtype: Dtype) -> None:
    with pytest.raises(RunError, match=r"^step 12: the LoRA gradient of layer 2 is not finite$"):
        decide([None, 5, 2], [1.0, 1.0, 1.0], dtype=dtype, step=12)
    with pytest.raises(RunError, match="layer 0 is"):  # not taken for "none"
        decide([0], [1.0], dtype=dtype, step=1)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_stops_the_run_in_every_dtype(dtype: Dtype, loss: float) -> None:
    """The loss itself is not scaled, so no lower scale would help."""
    with pytest.raises(RunError, match=rf"^step 4: the loss is {loss} on rank 1$"):
        decide([3, None], [1.0, loss], dtype=dtype, step=4)
    with pytest.raises(RunError, match=rf"^step 4: the loss is {loss} on rank 1; the weights of layer 2 are not fin"):
        decide([0, 5, 2], [1.0, loss, loss], dtype=dtype, step=4)


def test_first_nonfinite() -> None:
    fine, nan, inf = torch.ones(3), torch.tensor([1.0, math.nan]), torch.tensor([[-math.inf]])
    assert first_nonfinite([]) is None
    assert first_nonfinite([fine, fine[:0]]) is None
    assert first_nonfinite([fine, nan, inf]) == 1
    assert first_nonfinite([inf, nan]) == 0


def test_unscale_gives_the_gradient_of_the_unscaled_loss() -> None:
    weight = torch.tensor([3.0, -2.0], requires_grad=True)
    (4096.0 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert unscale(weight.grad, 4096.0).tolist() == [6.0, -4.0]
    assert weight.grad.tolist() == [6.0 * 4096, -4.0 * 4096]  # which the optimizer still divides itself
    assert unscale(weight.grad, 1.0) is weight.grad
