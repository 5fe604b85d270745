"""int8 with scales along the hidden axis: arithmetic by hand, cuts that commute, parts that are read alone."""

import math
from functools import partial
from pathlib import Path
from typing import Literal, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.model import frozen, int8, nf4
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import ExpertStack
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.frozen import BLOCK, SCALE, WEIGHT, FrozenLinear, Quantised, QuantisedLinear
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.int8 import UNSTACKED, Int8
from loraprune_ds.model.nf4 import NF4
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.ranks.flat import owned_range
from loraprune_ds.zero.params import needed_scales
from tests.support.families import tiny_model
from tests.support.family_cuts import FEW, MANY, draw
from tests.support.int8_models import open_int8
from tests.support.refusals import must_name

SHAPES = [(130, 70), (70, 33), (31, 100), (1, 5), (BLOCK, BLOCK)]
forms = pytest.mark.parametrize("form", [Int8(0), Int8(1)], ids=["rows are cut", "columns are cut"])
STACKS = [(5 * 70, 33), (4 * BLOCK, 7), (3 * 1, 5), (2 * 130, 3)]
OF_STACKS = [
    (Int8(1, rows), shape) for rows, shape in zip((70, BLOCK, 1, 130), STACKS, strict=True)
]
FORMS = [(form, shape) for form in (Int8(0), Int8(1)) for shape in SHAPES] + OF_STACKS
every = pytest.mark.parametrize(("form", "shape"), FORMS)
IN_4_BITS = [(NF4(0, torch.bfloat16), (5, 128)), (NF4(0, torch.float32), (1, BLOCK))]
IN_4_BITS += [(NF4(1, torch.bfloat16), (192, 7)), (NF4(1, torch.float16), (BLOCK, 2))]
sharded = pytest.mark.parametrize(("form", "shape"), [*FORMS, *IN_4_BITS])


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[1], generator=generator)


@forms
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_is_rounded_to_the_grid_of_its_block(
    form: Int8, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape)
    tensors = form.split(weight, dtype)
    for row in range(shape[0]):
        for column in range(shape[1]):
            first = (column if form.axis == 0 else row) // BLOCK * BLOCK
            block = (
                weight[row, first : first + BLOCK]
                if form.axis == 0
                else weight[first : first + BLOCK, column]
            )
            scale = (block.abs().max() / 127).to(dtype)
            q = max(-127, min(127, round(float(weight[row, column] / scale.float()))))
            assert tensors[WEIGHT][row, column] == q
            where = (row, first // BLOCK) if form.axis == 0 else (first // BLOCK, column)
            assert tensors[SCALE][where] == scale
            assert form.join(tensors.values())[row, column] == (scale * q).to(dtype)


@every
def test_a_cut_commutes_with_it(form: Int8, shape: tuple[int, int]) -> None:
    """Whole experts leave from a stack, otherwise single rows or columns along the axis without blocks."""
    is_stack = form.rows != UNSTACKED
    weight, axis, step = (
        weight_of(shape),
        0 if is_stack else form.axis,
        form.rows if is_stack else 1,
    )
    keep = torch.arange(shape[axis]).view(-1, step)[::2].flatten()
    cut_first, cut_last = (
        form.split(x, torch.bfloat16) for x in (weight.index_select(axis, keep), weight)
    )
    for name, kept in form.kept(axis, keep).items():
        assert torch.equal(cut_first[name], cut_last[name].index_select(*kept))


@pytest.mark.parametrize(("form", "shape"), OF_STACKS)
def test_each_expert_has_separate_blocks(form: Int8, shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    experts = [Int8(1).split(part, torch.bfloat16) for part in weight.split(form.rows)]
    stack = form.split(weight, torch.bfloat16)
    for name in form.tensors:
        assert torch.equal(stack[name], torch.cat([tensors[name] for tensors in experts]))
    assert stack[SCALE].shape == form.scale_shape(shape)
    assert torch.equal(
        form.join(stack.values()),
        torch.cat([Int8(1).join(tensors.values()) for tensors in experts]),
    )


@sharded
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_every_rank_reads_its_own_part(
    form: Quantised, shape: tuple[int, int], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (int8, nf4):
        monkeypatch.setattr(module, "READ_CHUNK", 3 * shape[1 - form.transposed])
    weight = weight_of(shape)
    in_file = (weight.t() if form.transposed else weight).reshape(-1)
    whole = form.split(weight, torch.bfloat16)
    for name, expected in whole.items():
        for rank in range(world_size):
            start, end = owned_range(expected.numel(), world_size, rank)
            found = form.read(
                name, shape, start, end, lambda a, b: in_file[a:b].clone(), torch.bfloat16
            )
            assert torch.equal(found, expected.reshape(-1)[start:end])


@sharded
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_rows_are_decoded_from_the_scales_a_rank_needs(
    form: Quantised, shape: tuple[int, int], world_size: int
) -> None:
    tensors = form.split(weight_of(shape), torch.bfloat16)
    whole, columns = form.join(tensors.values()), tensors[SCALE].shape[1]
    whole = whole.t() if form.transposed else whole
    stored = tensors[WEIGHT]
    width = stored.shape[1]
    for rank in range(world_size):
        low, high = needed_scales(form, shape, world_size)[rank].tolist()
        scales = tensors[SCALE].reshape(-1)[low:high].view(-1, columns)
        start, end = owned_range(stored.numel(), world_size, rank)
        for row in range(start // width, -(-end // width) if end > start else 0):
            elements = form.elements(stored[row]).view(1, -1)
            found = form.decode(elements, row, scales, low // columns)
            assert torch.equal(found, whole[row : row + 1].float())


def test_zeros_and_the_smallest_numbers_have_a_scale() -> None:
    weight = torch.zeros(2, BLOCK)
    weight[1, 0] = 1e-9
    tensors = Int8(0).split(weight, torch.float16)
    assert (tensors[SCALE] > 0).all()
    assert torch.isfinite(Int8(0).join(tensors.values())).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cuts_integers_and_scales_to_the_slices_of_a_cut_source(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path)
    dense = open_int8(tmp_path).weights
    keep = draw(dense.shape, FEW, MANY)
    small, held = dense.cut(keep), dense.shape.stored(2, int8=True)
    left = dense.shape.after(keep).stored(2, int8=True)
    cuts = {
        f"{dense.shape.prefix(i)}{name}": kept
        for i, layer_keep in enumerate(keep)
        for name, kept, _ in dense.shape.layers[i].cuts(
            layer_keep, partial(TensorSpec.format, int8=True)
        )
    }
    assert {name.rpartition(".")[2] for name in cuts} >= {WEIGHT, SCALE}
    for name, cut in cuts.items():
        size = held[name].shape
        whole = dense.read_stored(name, 0, math.prod(size), torch.bfloat16).view(size)
        expected = whole.index_select(cut.axis, cut.keep)
        assert expected.shape == left[name].shape
        for rank in range(3):
            start, end = owned_range(expected.numel(), 3, rank)
            found = small.read_stored(name, start, end, torch.bfloat16)
            assert torch.equal(found, expected.reshape(-1)[start:end]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_source_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    hidden = BLOCK + 6
    model = tiny_model("llama", seed=1, hidden_size=hidden)
    name = "model.layers.1.mlp.down_proj.weight"
    model.get_parameter(name).data[-1, 22] = bad
    model.save_pretrained(tmp_path)
    read = partial(open_int8(tmp_path).weights.read_stored, name, dtype=torch.bfloat16)
    read(0, BLOCK * 23)
    must_name(name, read, BLOCK * 23, hidden * 23)


def test_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", seed=1)
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[7, 3, 2] = math.nan
    model.save_pretrained(tmp_path)
    named = f"{tmp_path}/model.safetensors model.layers.1.mlp.experts.7.down_proj.weight"
    stack = "model.layers.1.mlp.experts.down.weight"
    must_name(named, open_int8(tmp_path).weights.read_full, stack, torch.bfloat16)


@forms
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_a_linear_computes_with_the_weight_that_it_stands_for(
    form: Int8, bias: bool, batch: tuple[int, ...]
) -> None:
    stock = nn.Linear(70, 45, bias=bias)
    held = form.split(stock.weight.detach(), torch.float32)
    linear = QuantisedLinear(stock, form, held)
    stock.weight.data = form.join(held.values())
    x = torch.randn(*batch, 70)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(given) for module, given in zip((linear, stock), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*(cast(Tensor, given.grad) for given in inputs))
    assert frozen.storage_format(linear) == form


@pytest.mark.parametrize(("transposed", "axis"), [(False, 0), (False, 1), (True, 0), (True, 1)])
def test_one_expert_at_a_time(
    transposed: bool, axis: Literal[0, 1], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, inputs, outputs, counts = 4, 70, 45, [3, 0, 2, 6]  # no token chose the second
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    form = Int8(axis, shape[0])
    held = form.split(weight_of((experts * shape[0], shape[1])), torch.float32)
    whole = form.join(held.values()).view(experts, *shape)
    stack = ExpertStack(torch.zeros(experts, *shape), transposed)
    stack.store_as(form, held)
    monkeypatch.setattr(int8, "dequantise", dequantise := Mock(wraps=int8.dequantise))
    x = torch.randn(
        sum(counts), inputs, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    found, expected = (of(x, counts) for of in (stack, ExpertStack(whole, transposed)))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    assert [call.args[0].shape for call in dequantise.call_args_list] == [shape] * 6


@pytest.mark.parametrize("family", ["phi3", "mixtral", "deepseek_v3", "gpt_oss"])
def test_only_the_linears_of_the_decoder_layers_are_held_as_int8(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path)
    pretrained = open_int8(tmp_path)
    model, weights = build_for_losses(pretrained, "eager"), pretrained.weights
    found = {name: (tuple(p.shape), p.dtype == torch.int8) for name, p in model.named_parameters()}
    stored = weights.storage.stored(weights.shape, 2)
    expected = {name: (held.shape, held.element_size == 1) for name, held in stored.items()}
    assert found == expected
    layers = decoder_layers(model)
    assert all(
        isinstance(layers[i].get_submodule(x.linear), FrozenLinear)
        for i, x in pretrained.shape.linears()
    )
