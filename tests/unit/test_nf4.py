"""NF4: codes, scales and values of bitsandbytes with its kernels and without, and cuts that commute."""

from itertools import pairwise
from typing import cast

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from loraprune_ds.model import codecs, frozen
from loraprune_ds.model.codecs import BLOCK, NF4, VALUES, NotFinite
from loraprune_ds.model.frozen import SCALE, WEIGHT, Blocks, QuantisedLinear, Slice

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
axes = pytest.mark.parametrize("axis", [0, 1], ids=["rows are cut", "columns are cut"])


@pytest.fixture(params=[True, False], ids=["kernels", "torch alone"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "CHUNK", 500)  # a few rows
    if not request.param:
        monkeypatch.setattr(codecs, "_kernels", lambda: None)


def weight_of(rows: int, hidden: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, hidden, generator=generator)
    weight *= torch.rand(rows, 1, generator=generator) * 10
    weight[0, :BLOCK] = 0  # a block without a scale
    middle = torch.tensor([(a + b) / 2 for a, b in pairwise(VALUES)])
    weight[1, : len(VALUES)] = torch.cat([middle, torch.ones(1)])  # halfway between two codes
    weight[2, 0] = 1e-39
    weight[3:, 5] *= 100
    return weight


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(7, 64), (130, 192)])
def test_codes_scales_and_values_are_those_of_bitsandbytes(
    rows: int, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "READ_CHUNK", 5 * hidden)
    weight = weight_of(rows, hidden).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    tensors = Blocks(NF4, dtype).split(weight)
    assert torch.equal(tensors[WEIGHT].view(-1), codes.view(-1))
    assert torch.equal(tensors[SCALE].view(-1), state.absmax)
    found = Blocks(NF4, dtype).join(tensors.values())
    assert found.dtype == dtype
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


@axes
@pytest.mark.usefixtures("kernels")
def test_a_cut_commutes_with_it(axis: int) -> None:
    form = Blocks(NF4, torch.bfloat16, axis == 1)
    weight = weight_of(130, 192) if axis == 0 else weight_of(130, 192).t()
    keep = torch.arange(130)[::3]
    whole = form.split(weight)
    small = form.split(weight.index_select(axis, keep))
    part = form.kept(Slice(axis, keep))
    for name in form.tensors:
        assert torch.equal(small[name], whole[name].index_select(*part))
    stored = form.stored((weight.shape[0], weight.shape[1]))
    sizes = {name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()}
    assert stored == sizes
    values = form.join(small.values())
    assert torch.equal(values, form.join(whole.values()).index_select(axis, keep))


@axes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
def test_a_linear_computes_with_the_weight_that_it_stands_for_and_keeps_its_codes_alone(
    axis: int, bias: bool, input_dtype: torch.dtype
) -> None:
    """Norms in fp32 give it inputs in fp32. It computes in the dtype of its weight all the same."""
    stock = nn.Linear(128, 192, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    form = Blocks(NF4, torch.bfloat16, axis == 1)
    linear = QuantisedLinear(stock, form, form.split(stock.weight))
    stock.weight.data = form.join([linear.weight, linear.weight_scale])
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1), dtype=input_dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = linear(inputs[0])
    expected = stock(inputs[1].bfloat16()).to(input_dtype)
    assert torch.equal(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    assert torch.equal(*(cast(Tensor, given.grad) for given in inputs))
    assert [t.data_ptr() for t in saved] == [
        linear.weight.data_ptr(),
        linear.weight_scale.data_ptr(),
    ]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_has_no_codes(bad: float) -> None:
    weight = weight_of(7, 64)
    weight[6, 63] = bad
    with pytest.raises(NotFinite):
        Blocks(NF4, torch.float32).split(weight)
