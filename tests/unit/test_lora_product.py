"""A linear with LoRA as one operation: PEFT's own linear with the same parameters is the oracle, in fp64."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.frozen import Int8
from loraprune_ds.model.int8_linear import Int8Linear, form_of
from loraprune_ds.model.lora_product import OneProduct

CONFIG = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.4)
IN, OUT = 70, 9


def pair(*, bias: bool, int8: bool, dtype: torch.dtype = torch.float64) -> tuple[OneProduct, LoraLinear]:
    """Builds both with the same parameters. PEFT's has the dequantised weight."""
    torch.manual_seed(1)
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    dense.requires_grad_(False)
    base = dense
    if int8:
        base = Int8Linear(dense, Int8(0))
        tensors = form_of(base).split(dense.weight, dtype)
        for name, tensor in tensors.items():
            getattr(base, name).data = tensor
        dense.weight.data = form_of(base).join(tensors)
    settings: Any = {"config": CONFIG, "r": CONFIG.r, "lora_alpha": CONFIG.lora_alpha}
    ours, theirs = OneProduct(base, "default", **settings), LoraLinear(dense, "default", **settings)
    for factor, other in zip(factors(ours), factors(theirs), strict=True):
        factor.data = torch.randn_like(factor, dtype=dtype)
        other.data = factor.data.clone()
    return ours, theirs


def factors(linear: LoraLinear) -> list[nn.Parameter]:
    return [parameter for name, parameter in linear.named_parameters() if "lora_" in name]


def run(linear: LoraLinear, x: Tensor) -> list[Tensor]:
    """Returns the output and the gradients of A, B and x, which is (batch, window, in_features)."""
    torch.manual_seed(2)  # the same dropout
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
def test_the_output_has_the_bits_of_pefts(dtype: torch.dtype) -> None:
    ours, theirs = pair(bias=False, int8=False, dtype=dtype)
    x = torch.randn(2, 5, IN, dtype=dtype)
    assert torch.equal(run(ours, x)[0], run(theirs, x)[0])


def test_without_the_adapter_the_base_computes() -> None:
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(4, IN, dtype=torch.float64)
    ours._disable_adapters = True
    assert torch.equal(ours(x), ours.base_layer(x))


def test_keeps_the_input_the_mask_and_a_narrow_product() -> None:
    ours, _ = pair(bias=True, int8=False)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours.train()(x)
    parameters = {parameter.data_ptr() for parameter in ours.parameters()}
    assert kept[0].data_ptr() == x.data_ptr()  # no copy: neighbours keep the same
    shapes = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in parameters]
    assert shapes == [(2, 5, IN), (2, 5, IN), (2, 5, CONFIG.r)]
