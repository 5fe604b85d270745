"""Sizes read from config.json, and the arithmetic of groups."""

from typing import Any

import pytest

from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.layer_scores import random_scores
from loraprune_ds.pruning.ranking import rank
from tests.support.families import LLAMA_LINEARS, tiny_config
from tests.support.published import sizes_of
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import LLAMA_7B, SMOLLM2, goal_of, gone, make_shape

LLAMA_CONFIG = sizes_of("llama", 48, 100, 2, 6, num_key_value_heads=3, vocab_size=33)
REQUIRED = sorted(LLAMA_CONFIG.keys() - {"model_type", "num_key_value_heads"})


def without(*keys: str, **values: Any) -> dict[str, Any]:
    return {key: value for key, value in LLAMA_CONFIG.items() if key not in keys} | values


def read(config: dict[str, Any]) -> ModelShape:
    return shape_from_config(config, "somewhere")


def test_a_llama_also_of_older_configs() -> None:
    """LLaMA-1 files have neither key-value heads nor a head size. Some write null."""
    shape = read(LLAMA_CONFIG)
    assert (shape.hidden_size, shape.head_dim, shape.attention[0].queries, shape.vocab_size) == (
        48,
        8,
        6,
        33,
    )
    assert shape.counts == (LayerCounts(heads=3, channels=100),) * 2
    assert (shape.tie_word_embeddings, shape.biases) == (False, frozenset())
    assert shape.is_uniform
    for config in (
        without("num_key_value_heads"),
        without(num_key_value_heads=None, head_dim=None),
    ):
        shape = read(config)
        assert (shape.attention[0].queries, shape.counts[0]["heads"], shape.head_dim) == (6, 6, 8)
    assert read(without(head_dim=20)).head_dim == 20


def test_layers_that_differ() -> None:
    own = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 7}
    shape = read(without(model_type="pruned_llama", per_layer_config={"1": own}))
    assert shape.counts == (LayerCounts(heads=3, channels=100), LayerCounts(heads=1, channels=7))
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
        (without(per_layer_config={"1": {"num_attention_heads": 4}}), "layer 1 4 3"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(config: dict[str, Any], names: str) -> None:
    must_name(f"somewhere {names}", read, config)


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("llama", {"num_hidden_layers": 2000}, "num_hidden_layers 2000"),
        ("t5", {"num_decoder_layers": 2000}, "num_decoder_layers 2000"),
        ("nemotron_h", {"hybrid_override_pattern": 2000 * "M"}, "num_hidden_layers 2000"),
        ("glm4_moe", {"num_nextn_predict_layers": 2000}, "num_nextn_predict_layers 2000"),
        ("qwen3_moe", {"num_experts": 10_000}, "num_experts 10000"),
        ("llama", {"vision_config": {"depth": 2000}}, "depth 2000"),
    ],
)
def test_more_layers_or_experts_than_any_model_has_are_refused(
    family: str, changes: dict[str, Any], key: str
) -> None:
    """Each would be built before a plan or run says anything. A million layers take minutes."""
    config = tiny_config(family).to_dict()
    if "hybrid_override_pattern" in changes:
        del config["layers_block_type"]
    must_name(f"somewhere config.json {key}", read, config | changes)


@pytest.mark.parametrize(
    "shape", [SMOLLM2, LLAMA_7B, make_shape([(3, 7), (2, 9)], head_dim=5, queries_per_group=4)]
)
def test_a_group_is_what_leaves_with_it(shape: ModelShape) -> None:
    dense = shape.linear_numel()
    for kind in shape.kinds:
        layer = shape.counts[0]
        fewer = LayerCounts({**layer, kind: layer[kind] - 1})
        assert (
            dense - shape.resized((fewer, *shape.counts[1:])).linear_numel()
            == shape.group_numel[kind]
        )


def test_biases_leave_with_their_linear() -> None:
    biased = without(attention_bias=True, mlp_bias=True)
    shape = read(biased)
    assert shape.biases == {linear.name for linear in LLAMA_LINEARS}
    assert read(biased | {"model_type": "mistral"}).biases == frozenset()  # its class has none
    smaller = shape.resized((LayerCounts(heads=2, channels=90), shape.counts[1]))
    lost = shape.total_numel() - smaller.total_numel()
    # q, k, v of one group, gate and up of ten channels. o and down keep theirs
    biases = 8 * (2 + 2) + 10 * 2
    assert lost == shape.linear_numel() - smaller.linear_numel() + biases


# Three kinds of groups go through shapes and ranking by their marks alone


def test_equal_layers_stay_one_object() -> None:
    """A plan of many layers looks at each sort once. The order of kinds does not matter."""
    shape = make_shape([(4, 60)] * 4)
    left = shape.resized(
        [LayerCounts(channels=60, heads=4), *[LayerCounts(heads=2, channels=60)] * 3]
    )
    assert len({id(layer) for layer in shape.layers}) == 1
    assert [id(layer) == id(left.layers[1]) for layer in left.layers] == [False, True, True, True]


SORTS = ["linear_attention", "full_attention"]


def test_each_kind_of_a_hybrid_gives_its_share() -> None:
    config = tiny_config("qwen3_5_text", num_hidden_layers=4, layer_types=SORTS * 2)
    shape = shape_from_config(config.to_dict(), "a hybrid")
    assert shape.kinds == ("heads", "delta", "channels")
    goal = goal_of(shape, ratio=0.5, ranking="global")
    left = shape.after(rank(random_scores(shape, 0), shape, goal, 1))
    removed = gone(left, shape)
    assert abs(removed - 0.5 * shape.linear_numel()) <= max(shape.group_numel.values())
    for kind in ("heads", "delta"):  # each gives its share, the channels the rest
        fewer = sum(a[kind] - b[kind] for a, b in zip(shape.counts, left.counts, strict=True))
        assert abs(fewer * shape.group_numel[kind] - goal.leaving[kind]) <= shape.group_numel[kind]
