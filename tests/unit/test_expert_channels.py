"""Channels that leave the experts of a layer: each expert loses its own, and all lose as many."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig, RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import find_experts
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.family_row import LINES, Lines
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.pretrained import cut_to, open_for_pruning, open_pretrained
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.criterion import gradient_estimate
from loraprune_ds.pruning.importance import random_scores, score_groups
from loraprune_ds.pruning.limits import Limits, make_limits
from loraprune_ds.pruning.mask_gradients import MaskGradients
from loraprune_ds.pruning.prunable_model import LoraFactors
from loraprune_ds.pruning.ranking import rank_global, rank_uniform
from loraprune_ds.pruning.step import _from_mask, _to_mask, all_groups
from tests.families import THIN, tiny_model
from tests.family_cuts import (
    FEW,
    MANY,
    PROMPT,
    cut_and_export,
    dense,
    difference,
    draw,
    load,
    logits,
    reopened,
    sparse_layers,
    thinned,
)
from tests.oracle.models import make_batches
from tests.plain_model import PlainModel
from tests.published import MIXTURES
from tests.unit.plain_training import PlainRun, fresh_lora
from tests.unit.test_expert_scores import find_stock
from tests.unit.test_experts import saved
from tests.unit.test_family_proof import TOLERANCE, assert_masked_equals_cut

WHOLE = [name for name, family in FAMILIES.items() if family.mixture and "expert_channels" in family.fixed]
ALL = (5, 23)
SIZE = 8  # channels of a tiny expert
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("fresh_transformers"),
]


def config_of(share: float = 1.0, **changes: Any) -> PruneConfig:
    prune: dict[str, Any] = {"protected_first": 0, "protected_last": 0, "channel_multiple": 1, **changes}
    return PruneConfig(channel_share=share, **prune)


def thin_shape(family: str) -> ModelShape:
    return thinned(dense(family)).shape


def rows_of(family: str, channel: int) -> list[int]:
    """Returns where the stock classes have gate and up of a channel. GPT-OSS has them in turn."""
    return [2 * channel, 2 * channel + 1] if family == "gpt_oss" else [channel, SIZE + channel]


# Cuts


@pytest.mark.parametrize("family", THIN)
def test_masked_equals_cut(family: str) -> None:
    """Heads, whole experts and channels of the other experts leave in one cut."""
    assert_masked_equals_cut(family, thinned(dense(family)), thinned(dense(family)), [FEW, MANY])


@pytest.mark.parametrize("lines", [Lines(1, 2), Lines(2, 1)])
def test_gate_and_up_in_another_order_are_found(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "mixtral" if lines.together == 2 else "gpt_oss"
    monkeypatch.setitem(LINES, "gate_up" if family == "mixtral" else "gate_up_in_turn", lines)
    with pytest.raises(AssertionError):
        test_masked_equals_cut(family)


@pytest.mark.parametrize("family", THIN)
def test_equal_layers_are_a_stock_model(family: str, tmp_path: Path) -> None:
    made = cut_and_export(thinned(dense(family)), tmp_path / family, FEW, FEW)
    model = load(made.folder)
    assert type(model).__module__.startswith("transformers.models.")
    assert difference(logits(model), made.logits) < TOLERANCE
    left = open_pretrained(made.folder).shape
    assert left.layers == made.shape.layers
    assert left.widest["expert_channels"] == SIZE - 3


@pytest.mark.parametrize("family", THIN)
def test_layers_that_differ_have_the_modelling_file(family: str, tmp_path: Path) -> None:
    """The last layer has lost channels before. What is left is opened, and loses more."""
    network = thinned(dense(family))
    keep = draw(network.shape, ALL, ALL)
    network.cut([*all_groups(network.shape)[:-1], keep[-1]])
    made = cut_and_export(network, tmp_path / family, FEW, MANY)
    model = load(made.folder, trust_remote_code=True)
    assert type(model).__name__ == "PrunedForCausalLM"
    assert difference(logits(model), made.logits) < TOLERANCE
    pretrained = open_pretrained(made.folder)
    assert pretrained.shape.layers == made.shape.layers
    assert difference(logits(reopened(pretrained)), made.logits) < TOLERANCE


@pytest.mark.parametrize("family", THIN)
def test_a_cut_model_is_read_from_the_dense_files(family: str, tmp_path: Path) -> None:
    """As a resumed run does. It is what the live cut leaves, bit by bit, and so is any flat part of it."""
    saved(family, tmp_path)
    network = thinned(dense(family))
    keep = draw(network.shape, (3, 13), (4, 14))
    network.cut(keep)
    source = open_for_pruning(tmp_path, RunConfig("unused", prune=config_of()))
    left = cut_to(source, keep, "float32")
    assert left.shape.layers == network.shape.layers
    assert left.shape.kinds == ("heads", "experts", "expert_channels")
    live = dict(network.model.get_base_model().named_parameters())
    for name, size in left.shape.parameters().items():
        path, _, last = name.rpartition(".")
        wanted = live[name if name in live else f"{path}.base_layer.{last}"].detach().flatten()
        step = -(-len(wanted) // 3)
        ends = [(at, min(at + step, len(wanted))) for at in range(0, len(wanted), step)]
        parts = [left.read_flat(name, start, end, torch.float32) for start, end in ends]
        assert torch.equal(torch.cat(parts), wanted), (name, size)


# Scores


@pytest.mark.parametrize("family", THIN)
def test_a_channel_scores_what_leaves_with_it(family: str) -> None:
    network = thinned(dense(family))
    network.model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
    model = cast(Any, PlainModel(network.model, network.shape))
    found = score_groups(model, "lora", 1).by_layer("none")
    factors = [*model.lora_factors()]
    for i in sparse_layers(network.shape):
        wanted = torch.zeros(23, SIZE)
        for linear in (x for x in network.shape.linears(i) if x.is_stack):
            lora, weight = factors[i][linear.name], model.owned_weight(i, linear)
            blocks = weight.flat.view(weight.shape).chunk(23)
            of_experts = zip(*(t.chunk(23) for t in (lora.A, lora.B, lora.grad_A, lora.grad_B)), strict=True)
            for e, (block, one) in enumerate(zip(blocks, of_experts, strict=True)):
                own = LoraFactors(*one, scaling=lora.scaling)
                score = (gradient_estimate(own) * (block + lora.scaling * own.B @ own.A)).abs()
                score = score.T if linear.transposed else score  # (outputs, inputs)
                for c in range(SIZE):
                    wanted[e, c] += score[:, c].sum() if linear.reads_groups else score[rows_of(family, c)].sum()
        torch.testing.assert_close(found[i]["expert_channels"].view(23, SIZE).float(), wanted, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found[i]["experts"].float(), wanted.sum(1), rtol=1e-4, atol=1e-9)
    normed = score_groups(model, "lora", 1).by_layer("l2")  # gate, up and down count alike
    last = normed[-1]["expert_channels"]
    assert 1 <= float(last.norm()) <= 3


@pytest.mark.parametrize("family", THIN)
def test_fisher_is_the_gradient_of_a_mask_on_each_channel(family: str) -> None:
    network, masks, counts = thinned(dense(family)), dict[int, Tensor](), dict[int, list[int]]()
    recorder = MaskGradients(cast(Any, PlainModel(network.model, network.shape)))

    def masked(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, list[int]]) -> tuple[Tensor, list[int]]:
            counts[layer] = inputs[1]
            masks[layer] = torch.ones_like(inputs[0], requires_grad=True)
            return inputs[0] * masks[layer], inputs[1]

        return hook

    for i in sparse_layers(network.shape):
        find_experts(decoder_layers(network.model)[i])[0].down.register_forward_pre_hook(masked(i))
    with recorder.record():
        network.model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
        found = recorder.scores(1).by_layer("none")
    for i in counts:
        grad = masks[i].grad
        assert grad is not None
        pieces = grad.split(counts[i])
        of_channels = torch.stack([part.square().sum(0) for part in pieces])
        torch.testing.assert_close(found[i]["expert_channels"].float(), of_channels.flatten())
        of_experts = torch.stack([part.sum(1).square().sum() for part in pieces])
        torch.testing.assert_close(found[i]["experts"].float(), of_experts)


@pytest.mark.parametrize("criterion", ["lora", "fisher", "gradient"])
@pytest.mark.parametrize("family", THIN)
def test_channels_that_do_nothing_go_first(family: str, criterion: str, tmp_path: Path) -> None:
    """Each expert has others. What reads them in its last linear is zero, and so is what LoRA adds at first.

    LoRA's estimate of a gradient mixes the columns of a matrix. In GPT-OSS channels are columns of gate and up.
    """
    model, sparse = tiny_model(family), sparse_layers(dense(family).shape)
    generator = torch.Generator().manual_seed(7)
    useless = torch.stack([torch.randperm(SIZE, generator=generator)[:3] for _ in range(23)])
    with torch.no_grad():
        for i in sparse:
            stock = find_stock(model, i)
            for e in range(23):
                inputs = stock.down_proj[e] if family == "gpt_oss" else stock.down_proj[e].T
                inputs[useless[e]] = 0
                if family == "gpt_oss":
                    stock.gate_up_proj[e][:, [row for c in useless[e].tolist() for row in rows_of(family, c)]] = 0
    model.save_pretrained(tmp_path)
    shape = open_pretrained(tmp_path).shape
    ratio = 3 * len(sparse) * shape.group_numel("expert_channels") / shape.linear_numel()
    at_once: dict[str, Any] = {"prune_every": 1, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    run = PlainRun(tmp_path, fresh_lora(shape), config_of(ratio=ratio, criterion=criterion, **at_once), 1)
    run.run(make_batches(steps=1, samples=12, tokens=16, vocab=97, seed=3))
    for i in sparse:
        kept = run.pruner.kept_of_dense[i]
        assert len(kept["experts"]) == 23
        stays = torch.zeros(23 * SIZE, dtype=torch.bool).index_fill(0, kept["expert_channels"], True).view(23, SIZE)
        assert stays.sum(1).tolist() == [SIZE - 3] * 23
        assert run.pruner.average.scores is not None
        chosen = run.pruner.average.scores[i]["expert_channels"].view(23, -1).any(1)  # by some token
        assert chosen.sum() > 15
        assert not stays.gather(1, useless)[chosen].any()


# Ranking and limits

RANKINGS: dict[str, Callable[..., list[LayerKeep]]] = {
    "uniform": lambda scores, shape, limits, ratio: rank_uniform(scores, shape, limits, ratio, ratio),
    "global": lambda scores, shape, limits, ratio: rank_global(scores, shape, limits, ratio, joint=False),
}


def big_shape() -> ModelShape:
    source, *_ = MIXTURES["Qwen3-30B-A3B"]
    return replace(shape_from_config(source | {"num_hidden_layers": 4}, "qwen3_moe"), thins_experts=True)


def gone(limits: Limits, shape: ModelShape) -> float:
    return 1 - shape.linear_numel() / limits.dense.linear_numel()


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("share", [0.3, 0.5, 1.0])
def test_the_ratio_is_split_by_the_share(share: float, ranking: Any) -> None:
    shape = big_shape()
    limits = make_limits(config_of(share, ratio=0.4, channel_multiple=8, ranking=ranking), shape)
    scores = random_scores(shape, 0)
    keep = RANKINGS[ranking](scores, shape, limits, 0.4)
    left = shape.after(keep)
    assert gone(limits, left) == pytest.approx(0.4, abs=0.006)
    by_experts = sum(128 - layer["experts"] for layer in left.layers) / (4 * 128)
    of_experts = 4 * 128 * shape.group_numel("experts") / shape.linear_numel()
    assert by_experts * of_experts == pytest.approx((1 - share) * 0.4, abs=0.006)
    for layer, kept in zip(left.layers, keep, strict=True):
        assert layer["expert_channels"] % 8 == 0
        of_expert = torch.bincount(kept["expert_channels"] // 768, minlength=128)
        assert of_expert.nonzero().flatten().tolist() == kept["experts"].tolist()
        assert set(of_expert[kept["experts"]].tolist()) == {layer["expert_channels"]}
    for found, given in zip(_from_mask(_to_mask(keep, shape), shape), keep, strict=True):
        assert all(torch.equal(found[kind], given[kind]) for kind in shape.kinds)


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_each_expert_keeps_its_best_channels(ranking: Any) -> None:
    shape = thin_shape("qwen3_moe")
    limits = make_limits(config_of(1.0, ratio=0.3, ranking=ranking), shape)
    scores = random_scores(shape, 0)
    for kept, layer in zip(RANKINGS[ranking](scores, shape, limits, 0.3), scores, strict=True):
        values = layer["expert_channels"].view(23, SIZE)
        left = len(kept["expert_channels"]) // 23
        best = values.argsort(1, descending=True)[:, :left].sort().values + SIZE * torch.arange(23)[:, None]
        assert torch.equal(kept["expert_channels"], best.flatten())


def test_whole_experts_alone_leave_by_default() -> None:
    shape = dense("mixtral").shape
    limits = make_limits(replace(config_of(), channel_share=None, ratio=0.3), shape)
    assert limits.shares == {"heads": 0, "experts": 1}
    assert [layer["expert_channels"] for layer in limits.floor] == [SIZE] * 2
    assert shape.kinds == ("heads", "experts")


@pytest.mark.parametrize("family", WHOLE)
def test_experts_as_wide_as_shared_ones_stay_whole(family: str) -> None:
    with pytest.raises(UserError, match=rf"prune\.channel_share: a {family} has shared experts, as wide as all others"):
        make_limits(config_of(), dense(family).shape)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {}, "prune.channel_share is about channels of experts, which a llama lacks"),
        ("mixtral", {"criterion": "reap"}, "prune.channel_share needs scores of channels"),
        ("mixtral", {"channel_multiple": 64}, "needs at least 64 channels, and an expert of layer 0 has 8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(family: str, changes: dict[str, Any], message: str) -> None:
    shape = replace(dense(family).shape, thins_experts=True)
    with pytest.raises(UserError, match=message):
        make_limits(config_of(**changes), shape)


def test_a_joint_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"prune\.channel_share and prune\.joint_budget exclude each other"):
        config_of(joint_budget=True, ranking="global")
