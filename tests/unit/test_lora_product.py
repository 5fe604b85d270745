"""A linear with LoRA as one operation against PEFT's linear with the same parameters, in fp64."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.frozen import Int8, Int8Linear, storage_format
from loraprune_ds.model.lora_product import FusedLoraLinear, draw_mask
from loraprune_ds.pruning.taps import Tap

CONFIG = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4)
IN, OUT = 70, 9


class SameMask(nn.Dropout):
    """PEFT's dropout with our masks."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        mask, kept = draw_mask(input, self.p)
        return input * mask / kept


def pair(*, bias: bool, int8: bool, dtype: torch.dtype = torch.float64) -> tuple[FusedLoraLinear, LoraLinear]:
    """Builds both with the same parameters. PEFT's has the dequantised weight."""
    torch.manual_seed(1)
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    dense.requires_grad_(False)
    base = dense
    if int8:
        base = Int8Linear(dense, Int8(0))
        tensors = storage_format(base).split(dense.weight, dtype)
        for name, tensor in tensors.items():
            getattr(base, name).data = tensor
        dense.weight.data = storage_format(base).join(tensors.values())
    settings: Any = {"config": CONFIG, "r": CONFIG.r, "lora_alpha": CONFIG.lora_alpha}
    ours, theirs = FusedLoraLinear(base, "default", **settings), LoraLinear(dense, "default", **settings)
    theirs.lora_dropout["default"] = SameMask(CONFIG.lora_dropout)
    for factor, other in zip(factors(ours), factors(theirs), strict=True):
        factor.data = torch.randn_like(factor, dtype=dtype)
        other.data = factor.data.clone()
    return ours, theirs


def factors(linear: LoraLinear) -> list[nn.Parameter]:
    return [parameter for name, parameter in linear.named_parameters() if "lora_" in name]


def run(linear: LoraLinear, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of A, B and x, which is (batch, window, in_features)."""
    torch.manual_seed(2)  # the same mask
    x = x.clone().requires_grad_()
    out = linear(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    gradients = [*(factor.grad for factor in factors(linear)), x.grad]
    return [out.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_peft_computes(bias: bool, int8: bool, training: bool) -> None:
    ours, theirs = pair(bias=bias, int8=int8)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    found, wanted = (run(linear.train(training), x) for linear in (ours, theirs))
    assert len(found) == len(wanted) == 4
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)  # fp64: sums may have another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_dropout_the_output_has_the_bits_of_pefts(dtype: torch.dtype) -> None:
    ours, theirs = pair(bias=False, int8=False, dtype=dtype)
    ours.lora_dropout["default"] = theirs.lora_dropout["default"] = nn.Identity()  # as PEFT has it then
    x = torch.randn(2, 5, IN, dtype=dtype)
    assert torch.equal(run(ours, x)[0], run(theirs, x)[0])


@pytest.mark.parametrize("p", [0.05, 0.5, 1e-4, 1e-6, 1 - 1e-6])
def test_dropout_has_its_rate(p: float) -> None:
    torch.manual_seed(3)
    x = torch.empty(1001, 999)  # no multiple of the 4 elements of a draw
    mask, kept = draw_mask(x, p)
    assert mask.shape == x.shape
    assert 0 <= kept - (1 - p) < 2**-16
    deviation = math.sqrt(kept * (1 - kept) / x.numel())
    for i in range(4):  # the place in a draw
        assert abs(mask.flatten()[i::4].double().mean() - kept) <= 4 * 2 * deviation


def test_the_seed_decides_the_mask_and_the_numbers_after_it() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append((*draw_mask(torch.empty(9, 7), 0.4)[:1], torch.rand(3)))
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_without_the_adapter_the_base_computes() -> None:
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(4, IN, dtype=torch.float64)
    ours._disable_adapters = True
    assert torch.equal(ours(x), ours.base_layer(x))


@pytest.mark.parametrize("tapped", [False, True])
def test_keeps_the_input_the_mask_and_a_narrow_product(tapped: bool) -> None:
    """A tap of pruning/taps.py saves the same input."""
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        seen: Any = Tap.apply(x, x, None) if tapped else x
        ours.train()(seen)
    if tapped:
        assert kept.pop(0).data_ptr() == x.data_ptr()
    parameters = {parameter.data_ptr() for parameter in ours.parameters()}
    assert kept[0].data_ptr() == x.data_ptr()  # no copy: neighbours keep the same
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in kept if tensor.data_ptr() not in parameters]
    wide, narrow = (2, 5, IN), (2, 5, CONFIG.r)
    assert found == [(wide, torch.float64), (wide, torch.uint8), (narrow, torch.float64)]
