"""The table of families against transformers: names, shapes, axes and buffers of every family, and what is refused."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraprune_ds.model.classes import build_on_meta
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.family import CHANNELS, FAMILIES, KEYS, PRUNED, QUERIES, WITHOUT_ROW
from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from tests.families import CAUSAL, EQUAL, SIZES, TINY, layers_with, tiny_config
from tests.refusals import must_name

# Counts of each kind. 6 query heads divide hidden_size 60, which some stock classes ask for.
DENSE, FEWER = (SIZES["num_key_value_heads"], SIZES["intermediate_size"]), (3, 11)
LAYERS = SIZES["num_hidden_layers"]
# transformers does not name all axes.
WITHOUT_PLAN = {"hunyuan_v1_dense", "gpt_oss", "granitemoe", "deepseek_v3", "glm4_moe_lite"}
# And it does not shard hybrids.
WITHOUT_PLAN |= {name for name in FAMILIES if "delta" in FAMILIES[name].kinds} | {"lfm2", "granitemoehybrid"}
WITHOUT_PLAN |= set(FAMILIES) - set(CAUSAL)


def config_json(family: str, **changes: Any) -> dict[str, Any]:
    return tiny_config(family, **changes).to_dict()


def read(family: str, **changes: Any) -> ModelShape:
    return shape_from_config(config_json(family, **changes), "somewhere")


def sizes_of(counts: tuple[int, int], shape: ModelShape) -> dict[str, int]:
    """Returns what config.json says of such a layer. An export always names head_dim."""
    heads, others = counts
    heads = DENSE[0] if "heads" in shape.family.fixed else heads
    counted = {next(iter(shape.family.count_fields(kind))): others for kind in shape.kinds if kind != "heads"}
    queries = {"num_attention_heads": heads * shape.queries_per_group, "num_key_value_heads": heads}
    return queries | counted | {"head_dim": shape.head_dim}


def stock_parameters(family: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the stock model. Only experts are stacked by our code."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    stack_experts(model)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# Names, shapes and axes


def test_every_family_has_a_tiny_model() -> None:
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", [x for x in CAUSAL if x not in EQUAL])
def test_the_table_explains_layers_with_any_counts(family: str) -> None:
    """Finds a tensor that a cut makes smaller and that the table does not know. The second layer has other counts."""
    shape = read(family)
    assert shape.layers == layers_with(shape, *[DENSE] * LAYERS)
    assert shape.queries_per_group == (1 if "query" in FAMILIES[family].widths else 2)
    config = config_json(family) | {"model_type": PRUNED + family, "head_dim": shape.head_dim}
    config["per_layer_config"] = {"1": {k: v for k, v in sizes_of(FEWER, shape).items() if k != "head_dim"}}
    pruned = shape_from_config(config, "somewhere")
    assert pruned.layers == layers_with(shape, DENSE, FEWER)
    stock, fewer = stock_parameters(family), stock_parameters(family, **sizes_of(FEWER, shape))
    assert shape.parameters() == stock
    stock |= {name: size for name, size in fewer.items() if name.startswith("model.layers.1.")}
    assert pruned.parameters() == stock


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_are_those_of_transformers_own_plan(family: str) -> None:
    """The plan for tensor parallelism. A wrong axis of a square weight shows nowhere else."""
    plan: dict[str, str] = tiny_config(family).base_model_tp_plan or {}  # type: ignore[attr-defined]
    named = {name.removeprefix("layers.*."): how for name, how in plan.items() if "linear_attn" not in name}
    axes = {linear.name: linear.axis for linear in FAMILIES[family].linears if linear.parts}
    theirs = {name: 0 if "colwise" in how else 1 if "rowwise" in how else None for name, how in named.items()}
    both = axes.keys() & theirs.keys()
    assert {name: axes[name] for name in both} == {name: theirs[name] for name in both}
    stacks = {linear.name for linear in FAMILIES[family].linears if linear.is_stack}  # named otherwise there
    assert both == axes.keys() - stacks or family in WITHOUT_PLAN


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, []),
        ({"decoder_sparse_step": 3}, [0, 1, 3, 4]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 4]}, [0, 1, 2, 4]),
    ],
)
def test_dense_layers_among_sparse_ones_have_no_experts(changes: dict[str, Any], dense: list[int]) -> None:
    config = config_json("qwen2_moe", num_hidden_layers=6, **changes)
    shape = shape_from_config(config, "somewhere")
    assert [i for i, layer in enumerate(shape.layers) if not layer["experts"]] == dense
    assert all("mlp.gate_proj" in shape.whole[i] for i in dense)
    assert shape.is_uniform
    exported = export_config(config, shape, "float32").config
    assert (exported["mlp_only_layers"], exported["model_type"]) == (dense, "qwen2_moe")
    assert shape_from_config(exported, "an export") == shape


def test_a_mixture_without_experts_is_refused() -> None:
    must_name("somewhere experts", read, "qwen2_moe", mlp_only_layers=[0, 1])


def test_a_width_that_the_class_computes_is_written_out() -> None:
    changes: dict[str, Any] = {"block_auto_adjust_ff_dim": True, "intermediate_size": 61, "block_multiple_of": 7}
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
    model = build_on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), cast(Any, model.get_output_embeddings())
    assert (head.weight is embedding.weight) == tied
    shape = shape_from_config(config, "somewhere")
    assert (shape.tie_word_embeddings, "lm_head.weight" in shape.parameters()) == (tied, not tied)
    stock: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=tied))
    stack_experts(stock)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffers[name], buffer), name


# Rows that are wrong

WRONG = [
    ("llama", Linear("self_attn.o_proj", 0, (QUERIES,))),  # wrong axes
    ("llama", Linear("mlp.up_proj", 1, (CHANNELS,))),
    ("llama", Linear("self_attn.k_proj", 0, (QUERIES,))),  # wrong width
    ("llama", Linear("mlp.gate_proj", 0, (KEYS,))),  # wrong kind
    ("phi3", Linear("self_attn.qkv_proj", 0, (QUERIES, KEYS))),  # a part is missing
    ("llama", Linear("mlp.more_proj", 0, (CHANNELS,))),  # no such linear
]
MISSING = [(family, linear) for family in ("llama", "phi3", "starcoder2") for linear in FAMILIES[family].linears]


@pytest.mark.parametrize(
    ("family", "row", "exists"), [(*case, True) for case in WRONG] + [(*case, False) for case in MISSING], ids=str
)
def test_a_wrong_row_is_named(family: str, row: Linear, exists: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {linear.name: linear for linear in FAMILIES[family].linears} | {row.name: row}
    linears = tuple(linear for linear in rows.values() if exists or linear is not row)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], linears=linears))
    must_name(f"somewhere model.layers.0.{row.name}.weight", read, family)


# Models of other kinds


@pytest.mark.parametrize("model_type", [*WITHOUT_ROW, "llama4_text", "jamba"])
def test_models_of_other_kinds_are_refused(model_type: str) -> None:
    must_name(f"somewhere '{model_type}' llama", shape_from_config, {"model_type": model_type}, "somewhere")


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"])
def test_experts_and_latent_attention_under_the_name_of_a_family(key: str) -> None:
    """Some remote modelling code goes by the name of the family that it started from."""
    must_name(f"somewhere {key}", shape_from_config, config_json("llama") | {key: 8}, "somewhere")
    assert shape_from_config(config_json("llama") | {key: None}, "somewhere") == read("llama")


def test_the_text_encoder_of_an_image_model_is_refused_as_that() -> None:
    config = config_json("t5") | {"architectures": ["T5EncoderModel"]}
    must_name("somewhere encoder", shape_from_config, config, "somewhere")
