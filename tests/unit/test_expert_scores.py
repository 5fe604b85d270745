"""The scores of experts: of shards as of the whole, and by masks as autograd has them."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import find_experts
from loraprune_ds.model.frozen import SCALE, WEIGHT, Int8
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard, split_experts
from loraprune_ds.pruning.mask_gradients import MaskGradients
from loraprune_ds.pruning.prunable_model import OwnedShard
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import ScalePlan, decode_rows
from tests.families import tiny_model
from tests.family_cuts import PROMPT, dense, sparse_layers
from tests.oracle.models import make_batches
from tests.plain_model import PlainModel
from tests.unit.plain_training import PlainRun, fresh_lora
from tests.unit.test_experts import KINDS, factors


def find_stock(model: nn.Module, layer: int) -> Any:
    """Returns transformers' own experts of a layer."""
    return next(m for m in decoder_layers(model)[layer].modules() if hasattr(m, "gate_up_proj"))


def test_shards_of_a_stack_score_as_the_experts_do() -> None:
    experts, rows, columns, r = 5, 6, 7, 3
    whole, lora = torch.randn(experts * rows, columns, generator=torch.Generator().manual_seed(3)), factors(5, 6, 7, 3)
    wanted = []
    for e in range(experts):
        a, ga = (f.view(experts, r, columns)[e] for f in (lora.A, lora.grad_A))
        b, gb = (f.view(experts, rows, r)[e] for f in (lora.B, lora.grad_B))
        weight = whole.view(experts, rows, columns)[e] + 2.0 * b @ a
        wanted.append(((gb @ a + b @ ga - gb @ ga) * weight).abs().sum(1))
    for world_size in (1, 2, 3, 4):
        total, flat = torch.zeros(experts * rows, dtype=torch.float64), whole.flatten()
        size = -(-len(flat) // world_size)
        for start in range(0, len(flat), size):
            shard = OwnedShard(flat[start : start + size], start, (experts * rows, columns))
            own = split_experts(shard, lora)
            total += torch.cat([score_shard(s, f, ELEMENT_CRITERIA["lora"], 0) for s, f, _ in own])
        torch.testing.assert_close(total.float(), torch.cat(wanted))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("form", [Int8(0), Int8(1, 70)], ids=["by rows", "by columns"])
def test_shards_of_int8_weights_score_as_the_weights_they_stand_for(form: Int8, world_size: int) -> None:
    shape, lora = (5 * 70, 7), factors(5, 70, 7, 3)
    held = form.split(torch.randn(shape, generator=torch.Generator().manual_seed(3)), torch.bfloat16)
    of_weight = form.join(held).flatten()

    def scores(owned: OwnedShard) -> Tensor:
        return torch.cat([score_shard(s, f, ELEMENT_CRITERIA["lora"], 0) for s, f, _ in split_experts(owned, lora)])

    for rank in range(world_size):
        start, end = owned_range(shape[0] * shape[1], world_size, rank)
        low, high = ScalePlan(form, shape, world_size).needed[rank].tolist()
        columns = held[SCALE].shape[1]
        scales = held[SCALE].flatten()[low:high].view(-1, columns)
        decode = partial(decode_rows, form, scales, low // columns)
        found = scores(OwnedShard(held[WEIGHT].flatten()[start:end], start, shape, decode))
        assert torch.equal(found, scores(OwnedShard(of_weight[start:end], start, shape)))


@pytest.mark.parametrize("criterion", ["lora", "lora_squared", "gradient", "fisher"])
@pytest.mark.parametrize("family", KINDS)
def test_experts_that_do_nothing_go_first(family: str, criterion: str, tmp_path: Path) -> None:
    """Their last linear is zero, and so is what LoRA adds at the first step."""
    model, sparse = tiny_model(family), sparse_layers(dense(family).shape)
    useless = {i: [[1, 5, 6, 20], [0, 2, 11, 22]][i] for i in sparse}
    with torch.no_grad():
        for i, experts in useless.items():
            stock = find_stock(model, i)
            for parameter in (stock.down_proj, getattr(stock, "down_proj_bias", None)):
                if parameter is not None:
                    parameter[experts] = 0
    model.save_pretrained(tmp_path)
    shape = open_pretrained(tmp_path).shape
    ratio = 5 * len(sparse) * shape.group_numel("experts") / shape.linear_numel()
    prune: dict[str, Any] = {"ratio": ratio, "prune_every": 1, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    prune |= {"protected_first": 0, "protected_last": 0, "criterion": criterion}
    config = PruneConfig(**prune)
    run = PlainRun(tmp_path, fresh_lora(shape), config, 1)
    run.run(make_batches(steps=1, samples=12, tokens=16, vocab=97, seed=3))
    for i, experts in useless.items():
        gone = set(range(23)) - set(run.pruner.kept_of_dense[i]["experts"].tolist())
        assert set(experts) <= gone
        assert len(gone) == 5


@pytest.mark.parametrize("family", KINDS)
def test_fisher_is_the_gradient_of_a_mask_on_each_experts_output(family: str) -> None:
    """A mask is put on every token and expert, and autograd gives its gradient."""
    network, masks = dense(family), dict[int, Tensor]()
    recorder = MaskGradients(cast(Any, PlainModel(network.model, network.shape)))

    counts, linear_ids = dict[int, list[int]](), network.shape.input_linear_ids()

    def masked(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> Tensor:
            counts[layer] = inputs[1]
            masks[layer] = torch.ones(len(output), 1, requires_grad=True)
            return output * masks[layer]

        return hook

    for i in sparse_layers(network.shape):
        find_experts(decoder_layers(network.model)[i])[0].down.register_forward_hook(masked(i))
    with recorder.record():
        network.model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
        found = {x.layer: sums for x, sums in zip(linear_ids, recorder.sums(), strict=True) if x.linear.is_stack}
    for i in counts:
        grad = masks[i].grad
        assert grad is not None
        wanted = torch.stack([part.square().sum() for part in grad.split(counts[i])])
        torch.testing.assert_close(found[i].float(), wanted)
