"""Sizes read from config.json, and the arithmetic of groups against a count of tensors."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from loraprune_ds.model.family import ATTENTION, FAMILIES, GATED, LLAMA_LINEARS
from loraprune_ds.model.family_row import Family, Linear, Part
from loraprune_ds.model.flops import needed_flops_per_token
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import LayerKeep, LayerShape, ModelShape
from loraprune_ds.model.storage import MODEL_DTYPE
from loraprune_ds.pruning.importance import random_scores
from loraprune_ds.pruning.ranking import rank_global, rank_uniform
from loraprune_ds.pruning.step import all_groups
from tests.published import sizes_of
from tests.refusals import must_name
from tests.unit.shapes_and_scores import LLAMA_7B, SMOLLM2, gone, limits_of, make_shape, uniform_counts

LLAMA_CONFIG = sizes_of("llama", 48, 100, 2, 6, num_key_value_heads=2, vocab_size=33)
REQUIRED = sorted(LLAMA_CONFIG.keys() - {"model_type", "num_key_value_heads"})
NO_NUMBER = "config.json holds a size that is not a number: "


def without(*keys: str, **values: Any) -> dict[str, Any]:
    return {key: value for key, value in LLAMA_CONFIG.items() if key not in keys} | values


def read(config: dict[str, Any]) -> ModelShape:
    return shape_from_config(config, "somewhere")


def test_a_llama_also_of_older_configs() -> None:
    """LLaMA-1 files have neither key-value heads nor a head size. Some write null."""
    shape = read(LLAMA_CONFIG)
    assert (shape.hidden_size, shape.head_dim, shape.queries_per_group, shape.vocab_size) == (48, 8, 3, 33)
    assert shape.layers == (LayerShape(heads=2, channels=100),) * 2
    assert (shape.tie_word_embeddings, shape.biases) == (False, frozenset())
    assert shape.is_uniform
    for config in (without("num_key_value_heads"), without(num_key_value_heads=None, head_dim=None)):
        shape = read(config)
        assert (shape.queries_per_group, shape.layers[0]["heads"], shape.head_dim) == (1, 6, 8)
    assert read(without(head_dim=20)).head_dim == 20


def test_layers_that_differ() -> None:
    own = {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 7}
    shape = read(without(model_type="pruned_llama", per_layer_config={"1": own}))
    assert shape.layers == (LayerShape(heads=2, channels=100), LayerShape(heads=1, channels=7))
    assert not shape.is_uniform


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (without("model_type"), "model_type None apertus"),
        (without(model_type=["llama"]), "model_type ['llama']"),
        *((without(key), key) for key in REQUIRED),
        (without(hidden_size="wide"), "config.json"),
        (without(num_attention_heads=0), "config.json"),
        (without(per_layer_config={"first": {}}), "config.json"),
        (without(per_layer_config=[1, 2]), "config.json"),
        (without(num_hidden_layers=0), "config.json"),
        (without(num_attention_heads=60), "config.json"),  # head_dim 48 // 60
        (without(head_dim=5), "head_dim 5"),
        (without(hidden_size=50, head_dim=8), "config.json"),
        (without(num_key_value_heads=4), "layer 0 6 4"),
        (without(per_layer_config={"1": {"num_attention_heads": 4}}), "layer 1 4 2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(config: dict[str, Any], names: str) -> None:
    must_name(f"somewhere {names}", read, config)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True, "tie_word_embeddings": True}, {"mlp_bias": True, "head_dim": 6}], ids=str
)
def test_counts_are_those_of_the_stock_model(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**without("model_type"), **changes))
    shape = read(LLAMA_CONFIG | changes)
    assert shape.parameters() == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shape.total_numel() == sum(parameter.numel() for parameter in model.parameters())
    linears = {x: [layer.get_submodule(x.name).weight for layer in model.model.layers] for x in LLAMA_LINEARS}
    assert shape.linear_numel() == sum(weight.numel() for weights in linears.values() for weight in weights)
    assert {x: shape.linear_shape(0, x) for x in linears} == {x: (*first.shape,) for x, (first, _) in linears.items()}


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA_7B, make_shape([(3, 7), (2, 9)], head_dim=5, queries_per_group=4)])
def test_a_group_is_what_leaves_with_it(shape: ModelShape) -> None:
    dense = shape.linear_numel()
    for kind in shape.kinds:
        layer = shape.layers[0]
        fewer = LayerShape({**layer, kind: layer[kind] - 1})
        assert dense - shape.with_layers((fewer, *shape.layers[1:])).linear_numel() == shape.group_numel(kind)


def test_biases_leave_with_their_linear() -> None:
    biased = without(attention_bias=True, mlp_bias=True)
    shape = read(biased)
    assert shape.biases == {linear.name for linear in LLAMA_LINEARS}
    assert read(biased | {"model_type": "mistral"}).biases == frozenset()  # its class has none
    smaller = shape.with_layers((LayerShape(heads=1, channels=90), shape.layers[1]))
    lost = shape.total_numel() - smaller.total_numel()
    biases = 8 * (3 + 2) + 10 * 2  # q, k, v of one group, gate and up of ten channels. o and down keep theirs
    assert lost == shape.linear_numel() - smaller.linear_numel() + biases


def test_the_operations_of_a_step_product_by_product() -> None:
    """Two layers, 2 key-value heads with 3 queries each of width 4, 10 channels, hidden 8, 50 words, 6 tokens."""
    shape = make_shape([(2, 10)] * 2, hidden=8, head_dim=4, queries_per_group=3)
    linears = 2 * (8 * 24 + 8 * 8 + 8 * 8 + 24 * 8 + 3 * 8 * 10)  # q, k, v, o and gate, up, down of two layers
    forward = 2 * linears + 2 * 8 * 50
    scores_and_values = 2 * 2 * (2 * 24 * 3)  # two layers, two products, 24 query columns over 3 tokens on average
    assert needed_flops_per_token(shape, 6) == 2 * forward + 3 * scores_and_values
    assert needed_flops_per_token(LLAMA_7B, 512) == pytest.approx(4 * 6.5e9, rel=0.05)


# A made-up family with a third kind of groups goes through shapes, limits and ranking by its table alone

EXPERTS = (Part("experts", "head"),)
THREE = Family((*ATTENTION, Linear("moe.up_proj", 0, EXPERTS), Linear("moe.down_proj", 1, EXPERTS), *GATED))
LAYER = LayerShape(heads=4, experts=6, channels=60)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    monkeypatch.setitem(FAMILIES, "three", THREE)
    return ModelShape("three", 16, 4, 2, 50, False, (LAYER,) * 4)


def test_kinds_come_in_the_order_of_the_forward_and_counts_in_any_order(three: ModelShape) -> None:
    assert three.kinds == ("heads", "experts", "channels")
    assert len({LAYER, LayerShape(channels=60, experts=6, heads=4)}) == 1
    assert LAYER != LayerShape(heads=4, experts=5, channels=60)


def test_a_group_of_the_third_kind_leaves_with_its_rows(three: ModelShape) -> None:
    keep = LayerKeep(heads=torch.arange(4), experts=torch.tensor([0, 2]), channels=torch.arange(60))
    cuts = {name: (kept.axis, kept.keep.tolist()) for name, kept, _ in MODEL_DTYPE.layer_cuts(three, 0, keep)}
    rows = [0, 1, 2, 3, 8, 9, 10, 11]
    assert cuts == {"moe.up_proj.weight": (0, rows), "moe.down_proj.weight": (1, rows)}
    left = three.after([keep, *all_groups(three)[1:]])
    assert left.layers[0] == LayerShape(heads=4, experts=2, channels=60)
    assert three.linear_numel() - left.linear_numel() == 4 * three.group_numel("experts") == 4 * 2 * 4 * 16


def test_each_ranking_reaches_the_target(three: ModelShape) -> None:
    limits, scores = limits_of(three, ratio=0.5, protected_first=1), random_scores(three, 0)
    left = three.after(rank_uniform(scores, three, limits, uniform_counts(limits, 0.5, 0.5)))
    assert left.layers[0] == LAYER  # protected
    assert len(set(left.layers[1:])) == 1
    assert all(left.layers[1][kind] < LAYER[kind] for kind in three.kinds)
    assert abs(gone(left, three) - 0.5 * three.linear_numel()) <= 3 * three.group_numel("channels") / 2
    left = three.after(rank_global(scores, three, limits, 0.5))
    assert abs(gone(left, three) - 0.5 * three.linear_numel()) <= max(map(three.group_numel, three.kinds))
    for kind in ("heads", "experts"):  # each gives its share, the channels the rest
        of_kind = sum(LAYER[kind] - layer[kind] for layer in left.layers) * three.group_numel(kind)
        share = limits.shares[kind] * gone(left, three)
        assert abs(of_kind - share) <= three.group_numel(kind)
    narrowest = {tuple(layer.values()) for layer in limits.narrowest(limits.bounds)}
    assert narrowest == {(h, e, 1) for h in range(1, 5) for e in range(1, 7)}
