"""Weights in blocks along stored rows: arithmetic by hand, cuts that commute, parts that are read alone."""

import math
from functools import partial
from pathlib import Path
from typing import cast, get_args
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.config_types import Frozen
from loraprune_ds.model import frozen
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.codecs import BLOCK, CODECS, INT8, NF4, Codec
from loraprune_ds.model.experts import ExpertStack
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.frozen import DENSE, SCALE, WEIGHT, Blocks, FrozenLinear, QuantisedLinear
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.ranks.flat import owned_range
from loraprune_ds.zero.params import needed_rows
from tests.support.families import tiny_model
from tests.support.family_cuts import FEW, MANY, draw
from tests.support.int8_models import open_int8
from tests.support.refusals import must_name

SHAPES = [(130, 70), (70, 33), (31, 100), (1, 5), (BLOCK, BLOCK)]
BF16 = torch.bfloat16
axes = pytest.mark.parametrize("axis", [0, 1], ids=["rows are cut", "columns are cut"])
IN_4_BITS = [
    (Blocks(NF4, BF16), (5, 128)),
    (Blocks(NF4, torch.float32), (1, BLOCK)),
    (Blocks(NF4, BF16, True), (192, 7)),
    (Blocks(NF4, torch.float16, True), (BLOCK, 2)),
]
IN_8_BITS = [(Blocks(INT8, BF16, turned), shape) for turned in (False, True) for shape in SHAPES]
every = pytest.mark.parametrize(("form", "shape"), IN_8_BITS + IN_4_BITS)


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[1], generator=generator)


def test_every_name_of_a_config_has_its_codec() -> None:
    assert tuple(CODECS) == get_args(Frozen)


@axes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_is_rounded_to_the_grid_of_its_block(
    axis: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    form, weight = Blocks(INT8, dtype, axis == 1), weight_of(shape)
    tensors = form.split(weight)
    codes, scales = (x.t() if form.transposed else x for x in tensors.values())
    for row in range(shape[0]):
        for column in range(shape[1]):
            first = (row if form.transposed else column) // BLOCK * BLOCK
            block = (
                weight[first : first + BLOCK, column]
                if form.transposed
                else weight[row, first : first + BLOCK]
            )
            scale = (block.abs().max() / 127).to(dtype)
            q = max(-127, min(127, round(float(weight[row, column] / scale.float()))))
            assert codes[row, column] == q
            where = (first // BLOCK, column) if form.transposed else (row, first // BLOCK)
            assert scales[where] == scale
            assert form.join(tensors.values())[row, column] == (scale * q).to(dtype)


@every
def test_a_cut_commutes_with_it(form: Blocks, shape: tuple[int, int]) -> None:
    weight, axis = weight_of(shape), int(form.transposed)
    keep = torch.arange(shape[axis])[::2]
    cut_first, cut_last = map(form.split, (weight.index_select(axis, keep), weight))
    kept = form.kept(frozen.Slice(axis, keep))
    for name in form.tensors:
        assert torch.equal(cut_first[name], cut_last[name].index_select(*kept))


@every
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_every_rank_reads_its_own_part(
    form: Blocks, shape: tuple[int, int], world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(shape)
    in_file = weight.t().contiguous() if form.transposed else weight
    monkeypatch.setattr(frozen, "READ_CHUNK", 3 * in_file.shape[1])
    whole = form.split(weight)
    for name, expected in whole.items():
        for rank in range(world_size):
            start, end = owned_range(expected.numel(), world_size, rank)
            found = form.read(name, shape, start, end, lambda a, b: in_file[a:b].clone())
            assert torch.equal(found, expected.reshape(-1)[start:end])


@every
@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_rows_are_decoded_from_the_scales_a_rank_needs(
    form: Blocks, shape: tuple[int, int], world_size: int
) -> None:
    tensors = form.split(weight_of(shape))
    whole = form.join(tensors.values())
    whole = whole.t() if form.transposed else whole
    stored = tensors[WEIGHT]
    rows, width = stored.shape
    for rank in range(world_size):
        low, high = needed_rows(rows, width, world_size)[rank].tolist()
        start, end = owned_range(stored.numel(), world_size, rank)
        for row in range(start // width, -(-end // width) if end > start else 0):
            elements = form.codec.elements(stored[row]).view(1, -1)
            found = form.decode(elements, row, tensors[SCALE][low:high], low)
            assert torch.equal(found, whole[row : row + 1].float())


def test_zeros_and_the_smallest_numbers_have_a_scale() -> None:
    weight, form = torch.zeros(2, BLOCK), Blocks(INT8, torch.float16)
    weight[1, 0] = 1e-9
    tensors = form.split(weight)
    assert (tensors[SCALE] > 0).all()
    assert torch.isfinite(form.join(tensors.values())).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cuts_integers_and_scales_to_the_slices_of_a_cut_source(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path)
    opened = open_int8(tmp_path)
    dense, storage = opened.weights, opened.storage
    keep = draw(dense.shape, FEW, MANY)
    small, held = dense.cut(keep), storage.stored(dense.shape)
    left = storage.stored(small.shape)
    cuts = {
        f"{dense.shape.prefix(i)}{name}": (storage.format(spec) or DENSE).kept(kept)
        for i, layer_keep in enumerate(keep)
        for spec, kept in dense.shape.layers[i].cuts(layer_keep)
        for name in storage.parts(spec)
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


@axes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_a_linear_computes_with_the_weight_that_it_stands_for(
    axis: int, bias: bool, batch: tuple[int, ...]
) -> None:
    form, stock = Blocks(INT8, torch.float32, axis == 1), nn.Linear(70, 45, bias=bias)
    held = form.split(stock.weight.detach())
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


@pytest.mark.parametrize(("codec", "inputs", "outputs"), [(INT8, 70, 45), (NF4, BLOCK, 2 * BLOCK)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_at_a_time(
    codec: Codec, inputs: int, outputs: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, counts = 4, [3, 0, 2, 6]  # no token chose the second
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    form = Blocks(codec, torch.float32)
    held = form.split(weight_of((experts * shape[0], shape[1])))
    whole = form.join(held.values()).view(experts, *shape)
    stack = ExpertStack(torch.zeros(experts, *shape), transposed)
    stack.store_as(form, held)
    monkeypatch.setattr(type(codec), "decode", decode := Mock(wraps=codec.decode))
    x = torch.randn(
        sum(counts), inputs, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    found, expected = (of(x, counts) for of in (stack, ExpertStack(whole, transposed)))
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    of_one = (shape[0], shape[1] // codec.per_byte)
    assert [call.args[0].shape for call in decode.call_args_list] == [of_one] * 6


@pytest.mark.parametrize("family", ["phi3", "mixtral", "deepseek_v3", "gpt_oss"])
def test_only_the_linears_of_the_decoder_layers_are_held_as_int8(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path)
    pretrained = open_int8(tmp_path)
    model, weights = build_for_losses(pretrained, "eager"), pretrained.weights
    found = {name: (tuple(p.shape), p.dtype == torch.int8) for name, p in model.named_parameters()}
    stored = pretrained.storage.stored(weights.shape)
    expected = {name: (held.shape, held.dtype == torch.int8) for name, held in stored.items()}
    assert found == expected
    layers = decoder_layers(model)
    assert all(
        isinstance(layers[i].get_submodule(x.linear), FrozenLinear)
        for i, x in pretrained.shape.linears()
    )
