"""Query heads as groups, in models with one or two key-value heads: scores of sets, the order they leave in, the rule.

Their cuts and exports are also among those of all families: a tiny gemma has one key-value head, a glm4 two.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds import Pruning
from loraprune_ds.model.groups import QUERY_HEADS, LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape, cached_numel
from loraprune_ds.pretrained import read_shape
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.layer_scores import LayerScores, add_in_turn
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.checkpoint import PruningCheckpoint, cut_to_checkpoint
from tests.oracle.models import make_batches, make_tiny_llama
from tests.support.driver import random_lora
from tests.support.families import layers_with, tiny_config, tiny_model
from tests.support.family_cuts import FEW, MANY, dense
from tests.support.local_training import make_model
from tests.support.mask_gradient_settings import PRUNE
from tests.support.masking import assert_masked_equals_cut
from tests.support.plain_training import PlainRun
from tests.support.published import sizes_of
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import goal_of

TWO: dict[str, Any] = {"num_attention_heads": 10, "num_key_value_heads": 2}


def source(queries: int, keys: int, *layers: tuple[int, int]) -> dict[str, Any]:
    """Returns a config.json with these query heads and key-value heads in all layers, or in each."""
    config = sizes_of(
        "llama", 144, 24, 3, queries, num_key_value_heads=keys, vocab_size=33, head_dim=8
    )
    own = {
        str(i): {"num_attention_heads": q, "num_key_value_heads": k}
        for i, (q, k) in enumerate(layers)
    }
    return config | ({"model_type": "pruned_llama", "per_layer_config": own} if layers else {})


def read(*heads: Any) -> ModelShape:
    return shape_from_config(source(*heads), "somewhere")


# Gates beside queries, sinks, a norm for each head, gates in a linear of their own.
@pytest.mark.parametrize("family", ["qwen3_5_text", "gpt_oss", "cohere", "lfm3"])
def test_masked_equals_cut(family: str) -> None:
    before, masked = (dense(family, **TWO) for _ in range(2))
    whole = before.shape
    assert_masked_equals_cut(family, before, masked, [FEW, MANY])
    assert QUERY_HEADS in before.shape.kinds
    assert cached_numel(before.shape) == cached_numel(whole)  # keys and values stay
    # also if some layers have a delta net instead
    assert whole.resized(layers_with(whole, FEW)).is_uniform


# Scores


def cost(s: Tensor, heads: Iterable[int]) -> float:
    """Returns what a set of heads costs: Σ over tokens of (Σ over the set of ∂loss/∂mask)². s is (tokens, heads)."""
    return float(s[:, [*heads]].sum(1).square().sum())


def order_of(s: Tensor) -> list[int]:
    """Returns the heads of a key-value head, the first to leave first."""
    return add_in_turn((s.T @ s)[None]).argsort().tolist()


def test_the_head_that_adds_least_leaves_next() -> None:
    """Such sets are nested, so they cost more than the best of each size. Those by single scores cost more still."""
    generator = torch.Generator().manual_seed(0)
    joint, single, least = 0.0, 0.0, 0.0
    for _ in range(30):
        common = torch.randn(7, 1, generator=generator) * torch.randn(1, 5, generator=generator)
        s = (common + 0.5 * torch.randn(7, 5, generator=generator)).double()
        order, alone = order_of(s), s.square().sum(0).argsort().tolist()
        for n in range(1, 5):
            assert order[n] == min(order[n:], key=lambda h: cost(s, [*order[:n], h]))
            joint, single = joint + cost(s, order[:n]), single + cost(s, alone[:n])
            least += min(cost(s, heads) for heads in combinations(range(5), n))
    assert least <= joint < 1.4 * least
    assert joint < 0.8 * single


def test_heads_that_make_up_for_each_other_leave_one_after_the_other() -> None:
    """And none has a lower score than one that left before it, or the ranking would choose another set."""
    a, b = torch.tensor([3.0, 0, 4]), torch.tensor([0.0, 7, 0])
    s = torch.stack([b, a, -a, a / 10], 1).double()
    scores = add_in_turn((s.T @ s)[None])
    assert scores.argsort().tolist() == [3, 2, 1, 0]
    assert scores[2] < scores[1] == pytest.approx(float(scores[2]))
    assert order_of(torch.zeros(1, 3).double()) == [2, 1, 0]  # ties keep the lower index


def test_a_cut_keeps_the_moments_of_the_heads_that_stay() -> None:
    s = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    moments = torch.einsum("tkg,tkh->kgh", s, s)
    keep = LayerKeep(query_heads=torch.tensor([0, 3, 5, 6]), channels=torch.tensor([1]))
    kept = LayerScores(query_heads=moments, channels=torch.arange(3.0)).select(keep)
    assert torch.equal(
        kept[QUERY_HEADS], torch.stack([moments[0][[0, 3]][:, [0, 3]], moments[1][1:3, 1:3]])
    )
    assert kept["channels"].tolist() == [1]


@pytest.mark.parametrize("ranking", ["global", "uniform"])
@pytest.mark.parametrize("criterion", ["fisher", "lora", "random"])
def test_an_equal_number_leaves_each_key_value_head(
    tmp_path: Path, ranking: Any, criterion: Any
) -> None:
    tiny_model("llama", seed=1, **TWO).save_pretrained(tmp_path)
    prune = replace(
        PRUNE, criterion=criterion, ranking=ranking, ratio=0.5, prune_every=2, moving_average=0.9
    )
    run = PlainRun(tmp_path, random_lora(tmp_path), prune, 6)
    run.run(make_batches(steps=6, samples=6, tokens=12, vocab=97, seed=3))
    assert len(run.cuts) > 1
    left = [[[h // 5 for h in heads].count(key) for key in range(2)] for heads, _ in run.kept()]
    assert all(first == second > 0 for first, second in left)
    assert sum(first for first, _ in left) < 10


# The rule


@pytest.mark.parametrize(
    ("heads", "kind"),
    [
        *(((8, 2), QUERY_HEADS), ((4, 1), QUERY_HEADS)),
        *(((4, 2), "heads"), ((2, 2), "heads"), ((1, 1), "heads"), ((9, 3), "heads")),
        ((9, 3, (3, 1), (9, 3), (6, 2)), "heads"),  # one kind in a model whose layers differ
        ((4, 2, (4, 2), (2, 2), (1, 1)), QUERY_HEADS),  # some queries have left
    ],
    ids=str,
)
def test_query_heads_are_groups_where_they_make_finer_steps(heads: Any, kind: str) -> None:
    shape, layers = read(*heads), heads[2:] or [heads] * 3
    assert shape.kinds == (kind, "channels")
    assert [layer.key_value_heads for layer in shape.layers] == [keys for _, keys in layers]
    assert [attention.queries for attention in shape.attention] == [
        queries for queries, _ in layers
    ]


def test_heads_that_stay_are_of_one_kind() -> None:
    assert shape_from_config(tiny_config("helium", **TWO).to_dict(), "somewhere").kinds == (
        "heads",
        "channels",
    )


@pytest.mark.parametrize("queries", [(2, 4, 6), (2, 2, 2)])
def test_layers_with_one_and_two_key_value_heads_are_exported_and_read_again(
    queries: tuple[int, ...],
) -> None:
    """Earlier versions left such layers."""
    config = source(6, 2, (3, 1), (6, 2), (6, 2))
    smaller = shape_from_config(config, "somewhere").resized(
        [LayerCounts(query_heads=n, channels=24) for n in queries]
    )
    again = shape_from_config(export_config(config, smaller, "float32").config, "export")
    assert again.layers == smaller.layers
    assert [layer.key_value_heads for layer in again.layers] == [1, 2, 2]
    assert not again.is_uniform


def test_servers_share_query_heads_and_repeat_key_value_heads() -> None:
    limits = goal_of(read(16, 2), tensor_parallel=4).limits
    assert limits.multiples == {QUERY_HEADS: 4, "channels": 4}
    assert limits.floor[0][QUERY_HEADS] == 4
    must_name("prune.tensor_parallel 3 key-value", goal_of, read(12, 2), tensor_parallel=3)


def test_an_older_checkpoint_of_the_callback_goes_on_with_whole_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_llama(tmp_path / "tiny", heads=8, ffn=24)

    def begin(model: Any, checkpoint: PruningCheckpoint | None = None) -> Pruning:
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        return Pruning(model.train(), optimizer, PRUNE, 4, checkpoint=checkpoint)

    with monkeypatch.context() as earlier:
        earlier.setattr(read_shape, "FEW_HEADS", 0)
        pruning = begin(make_model(folder))
        pruning.pruner.kept_of_dense[0]["heads"] = torch.tensor([1])
        pruning.save(tmp_path / "checkpoint-2")
    resumed = cut_to_checkpoint(model := make_model(folder), tmp_path, PRUNE, Communicator())
    layers = begin(model, resumed).model.shape.counts
    assert layers == ({"heads": 1, "channels": 24}, {"heads": 2, "channels": 24})
    assert begin(make_model(folder)).model.shape.kinds == (QUERY_HEADS, "channels")
