"""The families against transformers: names, shapes, axes and buffers of each, and what is refused."""

from functools import cache
from typing import Any, cast

import pytest
import torch

from loraprune_ds.model.classes import build_on_meta, causal_lm_class
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.model.families.blocks import columns, head_spans, rows
from loraprune_ds.model.family import FAMILIES, REFUSED
from loraprune_ds.model.groups import LayerCounts, Span, TensorSpec
from loraprune_ds.model.shape import ModelShape, cached_numel, state_numel
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.families import (
    CAUSAL,
    EQUAL,
    SIZES,
    changed,
    kinds,
    layers_with,
    marks,
    tiny_config,
)
from tests.support.refusals import must_name

# Counts of each kind. 6 query heads divide hidden_size 60, which some stock classes ask for.
DENSE, FEWER = (SIZES["num_key_value_heads"], SIZES["intermediate_size"]), (3, 11)
LAYERS = SIZES["num_hidden_layers"]
# transformers does not name all axes.
WITHOUT_PLAN = {
    "hunyuan_v1_dense",
    "stablelm",
    "gpt_oss",
    "granitemoe",
    "deepseek_v3",
    "glm4_moe_lite",
}
# And it does not shard hybrids.
WITHOUT_PLAN |= {name for name in FAMILIES if "delta" in kinds(name)} | {
    "lfm2",
    "granitemoehybrid",
    "nemotron_h",
}
WITHOUT_PLAN |= {"hunyuan_v1_moe", "lfm2_moe", "lfm3", "mistral4"}
WITHOUT_PLAN |= set(FAMILIES) - set(CAUSAL)
# Further tiny models of a family, for tensors that its first one lacks.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    **{
        family: [{"q_lora_rank": None}]
        for family in ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "mistral4")
    },
    **{
        family: [{"feed_forward_proj": x} for x in ("relu", "gated-gelu")]
        for family in ("t5", "mt5", "umt5")
    },
    **{family: [{"mlp_only_layers": [0]}] for family in ("qwen3_moe", "qwen3_next")},
}


def config_json(family: str, **changes: Any) -> dict[str, Any]:
    return tiny_config(family, **changes).to_dict()


def read(family: str, **changes: Any) -> ModelShape:
    return shape_from_config(config_json(family, **changes), "somewhere")


@cache
def tensors(family: str) -> set[str]:
    shapes = [read(family, **changes) for changes in ({}, *VARIANTS.get(family, ()))]
    return {tensor.name for shape in shapes for layer in shape.layers for tensor in layer.tensors}


def own_marks(family: str) -> list[TensorSpec]:
    """Returns the marks of tensors that the family has. One mark may serve several families."""
    return [mark for mark in marks(family) if mark.name in tensors(family)]


def sizes_of(counts: LayerCounts, shape: ModelShape) -> dict[str, int]:
    """Returns what config.json says of such a layer."""
    return {
        field: count
        for field, count in shape.family.layer_fields(shape.config, counts).items()
        if count
    }


def stock_parameters(family: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the stock model. Only experts are stacked by our code."""
    with torch.device("meta"):
        model = causal_lm_class(family)._from_config(tiny_config(family, **changes))
    stack_experts(model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Names, shapes and axes


@pytest.mark.parametrize("family", [x for x in CAUSAL if x not in EQUAL])
def test_the_family_explains_layers_with_any_counts(family: str) -> None:
    """Finds a tensor that a cut makes smaller and that has no mark. Every second layer has other counts."""
    shape = read(family)
    assert shape.counts == layers_with(shape, DENSE)
    assert {x.queries for x in shape.attention if x.queries} == {
        tiny_config(family).num_attention_heads
    }
    counts = layers_with(shape, DENSE, FEWER)
    second = range(1, len(counts), 2)
    fields = {field: count for i in second for field, count in sizes_of(counts[i], shape).items()}
    config = config_json(family) | {"model_type": PRUNED + family, "head_dim": shape.head_dim}
    pruned = shape_from_config(
        config | {"per_layer_config": {str(i): sizes_of(counts[i], shape) for i in second}},
        "somewhere",
    )
    assert pruned.counts == counts
    stock, fewer = (
        stock_parameters(family),
        stock_parameters(family, **fields, head_dim=shape.head_dim),
    )
    assert shape.parameters() == stock
    stock |= {
        name: size
        for name, size in fewer.items()
        if name.startswith(tuple(f"model.layers.{i}." for i in second))
    }
    assert pruned.parameters() == stock


def test_every_mark_without_lora_names_a_tensor_of_some_family() -> None:
    """Such a mark would be silent if it is misspelt. A linear without its mark is refused."""
    named = {mark.name for x in FAMILIES for mark in marks(x) if not mark.lora}
    assert named <= {name for x in FAMILIES for name in tensors(x)}


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_are_those_of_transformers_own_plan(family: str) -> None:
    """The plan for tensor parallelism. A wrong axis of a square weight shows nowhere else."""
    plan: dict[str, str] = tiny_config(family).base_model_tp_plan or {}  # type: ignore[attr-defined]
    named = {
        name.removeprefix("layers.*."): how
        for name, how in plan.items()
        if "linear_attn" not in name
    }
    axes = {mark.linear: mark.axis for mark in own_marks(family) if mark.lora and mark.spans}
    theirs = {
        name: 0 if "colwise" in how else 1 if "rowwise" in how else None
        for name, how in named.items()
    }
    both = axes.keys() & theirs.keys()
    assert {name: axes[name] for name in both} == {name: theirs[name] for name in both}
    stacks = {mark.linear for mark in marks(family) if mark.stack}  # named otherwise there
    assert both == axes.keys() - stacks or family in WITHOUT_PLAN


@pytest.mark.parametrize(
    ("family", "changes", "dense"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 1, "mlp_only_layers": []}, []),
        ("qwen2_moe", {"decoder_sparse_step": 3}, [0, 1, 3, 4]),
        ("qwen2_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1, 4]}, [0, 1, 2, 4]),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, [0, 2, 4]),
        ("ernie4_5_moe", {"moe_layer_start_index": 2, "moe_layer_end_index": 3}, [0, 1, 4, 5]),
    ],
)
def test_dense_layers_among_sparse_ones_have_no_experts(
    family: str, changes: dict[str, Any], dense: list[int]
) -> None:
    config = config_json(family, num_hidden_layers=6, **changes)
    shape = shape_from_config(config, "somewhere")
    assert [i for i, layer in enumerate(shape.counts) if not layer["experts"]] == dense
    assert all(
        "mlp.gate_proj" in {x.linear for x in shape.layers[i].linears if not x.spans} for i in dense
    )
    assert shape.is_uniform
    exported = export_config(config, shape, "float32").config
    assert exported["model_type"] == family
    assert shape_from_config(exported, "an export") == shape


def test_a_list_of_equal_choices_is_one_number() -> None:
    """Published Hunyuan mixtures say for each layer how many experts a token chooses."""
    assert read("hunyuan_v1_moe", moe_topk=[3, 3]) == read("hunyuan_v1_moe")


def test_what_layers_keep_of_earlier_tokens() -> None:
    """Some layers of a GLM-5 have an indexer, with one key of 8."""
    glm = read("glm_moe_dsa")
    assert (state_numel(glm), cached_numel(glm)) == (0, 2 * (16 + 4) + 8)
    assert glm.family.around(glm.config, 1) == ([0, 1], {})  # takes the indices of the first


def test_a_width_that_the_class_computes_is_written_out() -> None:
    changes: dict[str, Any] = {
        "block_auto_adjust_ff_dim": True,
        "intermediate_size": 61,
        "block_multiple_of": 7,
    }
    written = FAMILIES["lfm2"].explicit(config_json("lfm2", **changes))
    rows, _ = stock_parameters("lfm2", **changes)["model.layers.0.feed_forward.w1.weight"]
    assert rows == written["intermediate_size"]
    assert FAMILIES["lfm2"].explicit(written) == written


# Modules without weights


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", CAUSAL)
def test_modules_on_meta(family: str, tied: bool) -> None:
    """Parameters have no memory, tied heads stay tied, and buffers have the values of the stock model."""
    config = config_json(family, tie_word_embeddings=tied)
    model, tied = build_on_meta(config), tied and family != "nemotron_h"  # which never ties
    assert all(parameter.is_meta for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), cast(Any, model.get_output_embeddings())
    assert (head.weight is embedding.weight) == tied
    shape = shape_from_config(config, "somewhere")
    assert (shape.tie_word_embeddings, "lm_head.weight" in shape.parameters()) == (tied, not tied)
    stock = causal_lm_class(family)._from_config(tiny_config(family, tie_word_embeddings=tied))
    stack_experts(stock)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffers[name], buffer), name


# Families that are wrong

QUERIES, (KEYS,) = head_spans(tiny_config("llama"))
CHANNELS = Span("channels", SIZES["intermediate_size"])
WRONG = [
    ("llama", rows("self_attn.o_proj", QUERIES)),  # wrong axes
    ("llama", columns("mlp.up_proj", CHANNELS)),
    ("llama", rows("self_attn.k_proj", QUERIES)),  # wrong width
    ("llama", rows("mlp.gate_proj", KEYS)),  # wrong kind
    # a run is missing
    ("phi3", rows("self_attn.qkv_proj", Span("heads", 5, 12), Span("heads", 5, 6))),
]
MISSING = [
    (family, mark) for family in ("llama", "phi3", "starcoder2") for mark in own_marks(family)
]


@pytest.mark.parametrize(
    ("family", "wrong", "exists"),
    [(*case, True) for case in WRONG] + [(*case, False) for case in MISSING],
    ids=str,
)
def test_a_wrong_mark_is_named(
    family: str, wrong: TensorSpec, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(marks: list[Any]) -> list[Any]:
        return [mark for mark in marks if mark.name != wrong.name] + [wrong] * exists

    monkeypatch.setitem(FAMILIES, family, changed(family, change))
    must_name(f"somewhere model.layers.0.{wrong.name}", read, family)


# Models of other kinds


# Some remote modelling code goes by the name of the family that it started from.
OF_OTHERS = ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        *(({"model_type": x}, f"'{x}' llama") for x in (*REFUSED, "llama4_text", "jamba")),
        *((config_json("llama") | {key: 8}, key) for key in OF_OTHERS),
        (config_json("qwen2_moe", mlp_only_layers=[0, 1]), "experts"),
        *(
            (config_json(x, mlp_layer_types=["sparse", "dense"]), "mlp_layer_types first_k_dense")
            for x in ("glm4_moe_lite", "glm_moe_dsa", "exaone_moe")
        ),
        (config_json("hunyuan_v1_moe", moe_topk=[3, 2]), "size list"),
        (config_json("t5") | {"architectures": ["T5EncoderModel"]}, "encoder"),  # of an image model
    ],
)
def test_models_of_other_kinds_are_refused(config: dict[str, Any], names: str) -> None:
    must_name(f"somewhere {names}", shape_from_config, config, "somewhere")


def test_what_is_null_makes_no_model_of_another_kind() -> None:
    assert shape_from_config(config_json("llama") | dict.fromkeys(OF_OTHERS), "somewhere") == read(
        "llama"
    )
