"""The scores of experts, of shards and by masks, and the routers of DeepSeek-V3 and GLM-4.5."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loraprune_ds.config import PruneConfig
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, MaskGradients, score_shard
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.prunable_model import OwnedShard
from loraprune_ds.pruning.ranking import rank
from loraprune_ds.pruning.step import all_groups
from tests.oracle.models import make_batches
from tests.support.expert_factors import KINDS, TOLERANCE, factors
from tests.support.families import tiny_model
from tests.support.family_cuts import (
    PROMPT,
    dense,
    difference,
    find_experts,
    find_router,
    sparse_layers,
)
from tests.support.paper import FREE, OPEN, PAPER
from tests.support.plain_training import PlainRun, fresh_lora
from tests.support.refusals import must_name


def find_stock(model: nn.Module, layer: int) -> Any:
    """Returns transformers' own experts of a layer."""
    return next(
        m
        for m in decoder_layers(model)[layer].modules()
        if getattr(getattr(m, "down_proj", None), "ndim", 0) == 3
    )


def test_shards_of_a_stack_score_as_the_experts_do() -> None:
    experts, rows, columns, r = 5, 6, 7, 3
    whole, lora = (
        torch.randn(experts * rows, columns, generator=torch.Generator().manual_seed(3)),
        factors(5, 6, 7, 3),
    )
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
            score_shard(total, shard, lora, ELEMENT_CRITERIA["lora"], 0)
        torch.testing.assert_close(total.float(), torch.cat(wanted))


@pytest.mark.parametrize("criterion", ["lora", "fisher"])
@pytest.mark.parametrize("family", KINDS)
def test_experts_that_do_nothing_go_first(family: str, criterion: str, tmp_path: Path) -> None:
    """Their last linear is zero, and so is what LoRA adds at the first step."""
    model, sparse = tiny_model(family), sparse_layers(dense(family).shape)
    useless = dict(zip(sparse, ([1, 5, 6, 20], [0, 2, 11, 22]), strict=False))
    with torch.no_grad():
        for i, experts in useless.items():
            stock = find_stock(model, i)
            for parameter in (stock.down_proj, getattr(stock, "down_proj_bias", None)):
                if parameter is not None:
                    parameter[experts] = 0
    model.save_pretrained(tmp_path)
    shape = open_pretrained(tmp_path).shape
    ratio = 5 * len(sparse) * shape.group_numel["experts"] / shape.linear_numel()
    prune = {"ratio": ratio, "criterion": criterion, "prune_every": 1}
    at_once = {"warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    config = PruneConfig(**PAPER | FREE | prune | at_once)
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
    recorder = MaskGradients(cast(Any, LocalModel(network.model, network.shape)))

    counts, linears = dict[int, list[int]](), network.shape.input_linears()

    def masked(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> Tensor:
            counts[layer] = inputs[1]
            masks[layer] = torch.ones(len(output), 1, requires_grad=True)
            return output * masks[layer]

        return hook

    for i in sparse_layers(network.shape):
        find_experts(decoder_layers(network.model)[i]).down.register_forward_hook(masked(i))
    with recorder.record():
        network.model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
        found = {i: sums for (i, x), sums in zip(linears, recorder.sums(), strict=True) if x.stack}
    for i in counts:
        grad = masks[i].grad
        assert grad is not None
        wanted = torch.stack([part.square().sum() for part in grad.split(counts[i])])
        torch.testing.assert_close(found[i].float(), wanted)


# Routers with groups of experts and a correction of their scores

# six experts each, 3 are chosen
GROUPS: dict[str, Any] = {"n_routed_experts": 24, "n_group": 4, "topk_group": 2}


def deep() -> ModelShape:
    return dense("deepseek_v3", num_hidden_layers=4, **GROUPS).shape


def test_a_group_keeps_enough_for_the_router() -> None:
    """It compares groups by their best two, and takes 3 experts of two groups."""
    config = PruneConfig(**PAPER | OPEN | {"ratio": 0.1})
    limits = make_limits(config, deep())
    assert [layer["experts"] for layer in limits.floor] == [0, 8, 8, 8]
    assert limits.multiples["experts"] == 4
    more = make_limits(config, dense("deepseek_v3", **GROUPS, num_experts_per_tok=7).shape)
    assert more.floor[1]["experts"] == 16  # four of each, as two hold 7


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_every_group_loses_as_many(ranking: Any) -> None:
    """All of the least experts are in the first group."""
    shape, generator = deep(), torch.Generator().manual_seed(1)
    config = PruneConfig(ratio=0.3, protected_first=0, protected_last=0, ranking=ranking)
    scores = [
        LayerScores(
            (kind, torch.rand(n, generator=generator) + (torch.arange(n) >= 6))
            for kind, n in layer.items()
        )
        for layer in shape.counts
    ]
    keep = rank(scores, shape, make_goal(config, shape), 1)
    assert not len(keep[0]["experts"])
    for layer_keep, layer in zip(keep[1:], scores[1:], strict=True):
        experts = layer_keep["experts"]
        assert 8 <= len(experts) < 24
        of_each = len(experts) // 4
        for group in range(4):
            best = layer["experts"][6 * group : 6 * group + 6].topk(of_each).indices + 6 * group
            assert set(best.tolist()) == set(experts[experts // 6 == group].tolist())


def test_a_cut_is_the_router_whose_other_experts_nobody_may_choose() -> None:
    cut, masked = (dense("deepseek_v3", **GROUPS) for _ in range(2))
    kept = torch.tensor([0, 2, 5, 6, 8, 9, 12, 13, 15, 19, 20, 23])
    whole = all_groups(cut.shape)
    cut.cut([whole[0], LayerKeep({**whole[1], "experts": kept})])
    gone = torch.ones(24, dtype=torch.bool).index_fill(0, kept, False)
    find_router(decoder_layers(masked.model)[1]).e_score_correction_bias.data[gone] = -torch.inf
    assert difference(cut.logits(), masked.logits()) < TOLERANCE
    assert difference(cut.logits(), dense("deepseek_v3", **GROUPS).logits()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "tensors"),
    [
        ("glm4_moe", [f"mlp.gate.{CORRECTION}"]),
        ("ernie4_5_moe", ["mlp.gate.weight", f"mlp.gate.moe_statics.{CORRECTION}"]),
        ("hunyuan_v1_moe", ["mlp.gate.wg.weight"]),
        ("lfm2_moe", ["feed_forward.expert_bias"]),
    ],
)
def test_the_correction_stays_fp32(tmp_path: Path, family: str, tensors: list[str]) -> None:
    """Its values lie so close together that bf16 would choose other experts."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    opened = open_pretrained(tmp_path)
    weights = opened.weights
    names = [f"model.layers.{i}.{x}" for i in sparse_layers(weights.shape) for x in tensors]
    for name in names:
        wanted = model.state_dict()[name]
        assert torch.equal(
            weights.read_stored(name, 0, wanted.numel(), torch.bfloat16), wanted.flatten()
        )
        assert torch.equal(weights.read_full(name, torch.bfloat16), wanted)
    stored = opened.storage.stored(weights.shape)
    assert [x for x, tensor in stored.items() if tensor.dtype == torch.float32] == names


@pytest.mark.parametrize(
    ("family", "further"),
    [
        ("glm4_moe", "model.layers.2.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_linear_proj.0.weight"),
        ("exaone_moe", "mtp.fc.weight"),
    ],
)
def test_layers_that_predict_further_tokens_are_left_out(
    tmp_path: Path, family: str, further: str
) -> None:
    """DeepSeek and GLM publish them behind the last layer. transformers does not load them either."""
    tiny_model(family, num_nextn_predict_layers=1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {further: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    assert open_pretrained(tmp_path).shape.counts[1]["experts"] == 23
    save_file(
        tensors | {"model.layers.3.eh_proj.weight": torch.zeros(3, 3)},
        file,
        metadata={"format": "pt"},
    )
    must_name("model.layers.3.eh_proj.weight", open_pretrained, tmp_path)
