"""Checks config.json of a pruned model of every family: the source's fields that stay, and its rotary settings."""

import copy
import json
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from loraprune_ds.model.classes import config_object
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.families import CAUSAL, EQUAL, SIZES, layers_with, tiny_config

COUNTS = {
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "per_layer_config",
    "intermediate_size",
    "shared_intermediate_size",
    "num_local_experts",
    "num_experts",
    # the published names
    "global_head_dim",
    "num_global_key_value_heads",
    "n_routed_experts",
    "moe_num_experts",
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_hidden_layers",  # in no nemotron_h of transformers 5
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_heads",
    "num_cross_heads",
    "d_ff",
    "layer_sizes",
    "scale_decoder_outputs",
    # two ways to say which layers are dense
    "mlp_only_layers",
    "decoder_sparse_step",
}
# The last two are in files of old models and do not describe the network.
ABOUT_FILES = {
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "model_type",
    "_name_or_path",
    "pretraining_tp",
}
OLD_NAMES = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"}
UNIFORM, PER_LAYER = [(3, 13), (3, 13)], [(3, 13), (4, 14)]
both_counts = pytest.mark.parametrize("counts", [UNIFORM, PER_LAYER])
every_family = pytest.mark.parametrize("family", FAMILIES)
# In transformers 4, which has no lfm3. A nemotron_h has no rotary embedding.
every_old_family = pytest.mark.parametrize(
    "family", [x for x in CAUSAL if x not in (*EQUAL, "lfm3", "nemotron_h")]
)


def source(family: str, **changes: Any) -> dict[str, Any]:
    """Returns config.json as transformers 5 saves it, with all fields."""
    return json.loads(tiny_config(family, **changes).to_json_string(use_diff=False))


def published(family: str, **rope: Any) -> dict[str, Any]:
    """Returns config.json as transformers 4 saved it, with these rotary settings or none."""
    return {
        k: value for k, value in source(family).items() if k not in OLD_NAMES | {"rope_parameters"}
    } | rope


def exported(config: dict[str, Any], counts: list[tuple[int, int]]) -> ExportedConfig:
    dense = shape_from_config(config, "source")
    return export_config(config, dense.resized(layers_with(dense, *counts)), "bfloat16")


def export(config: dict[str, Any], counts: list[tuple[int, int]]) -> dict[str, Any]:
    return exported(config, counts).config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings as the class of the config reads them."""
    rope: dict[str, Any] = config_object(config).rope_parameters  # type: ignore[attr-defined]
    # an older name that transformers keeps
    return {key: value for key, value in rope.items() if key != "type"}


@pytest.mark.parametrize(
    ("family", "counts"),
    [
        *((x, UNIFORM) for x in FAMILIES),
        *((x, PER_LAYER) for x, family in FAMILIES.items() if not family.lm_class()),
    ],
)
def test_only_counts_change(family: str, counts: list[tuple[int, int]]) -> None:
    given = source(family) | {
        "a_field_of_the_future": {"x": [1]},
        "auto_map": {"AutoConfig": "x.Y"},
    }
    before = copy.deepcopy(given)
    found = export(given, counts)
    assert given == before
    changed = {
        key
        for key in given.keys() | found.keys()
        if given.get(key, "none") != found.get(key, "none")
    }
    assert changed <= COUNTS | ABOUT_FILES | OLD_NAMES | {"first_k_dense_replace"}
    assert not given.keys() & (changed - COUNTS - ABOUT_FILES)  # those are only added
    assert (
        found["head_dim" if family in CAUSAL else "d_kv"]
        == shape_from_config(given, family).head_dim
    )
    assert found["dtype"] == found["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "rope", [{}, {"rope_theta": 5000.0}, {"rope_theta": 5000.0, "rope_scaling": None}], ids=str
)
@every_old_family
def test_rotary_settings_in_older_words(family: str, rope: dict[str, Any]) -> None:
    """The families have different defaults for a config.json without settings."""
    given = published(family, **rope)
    found = export(given, UNIFORM)
    assert rope_parameters(found) == rope_parameters(given)
    # a Llama may be written as a Mistral, with all of its defaults
    if family not in ("llama", "mistral"):
        rotary = (
            {k: value for k, value in x.items() if "rope" in k or "rotary" in k}
            for x in (found, given)
        )
        assert next(rotary) == next(rotary)


@every_old_family
def test_rotary_settings_in_newer_words(family: str) -> None:
    """transformers 4 would silently ignore these, so the older words are added."""
    given = source(family)
    found = export(given, UNIFORM)
    full = given["rope_parameters"].get("full_attention", given["rope_parameters"])
    assert rope_parameters(found) == rope_parameters(given)
    assert found["rope_theta"] == full["rope_theta"]
    assert (found["rope_scaling"] or {"rope_type": "default"})["rope_type"] == full["rope_type"]
    assert found.get("partial_rotary_factor", 1.0) == full.get("partial_rotary_factor", 1.0)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@both_counts
@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_rotary_settings_for_each_kind_of_layer(family: str, counts: list[tuple[int, int]]) -> None:
    sliding = {"rope_type": "default", "rope_theta": 500.0}
    nested = {"full_attention": YARN | {"rope_theta": 7000.0}, "sliding_attention": sliding}
    found = export(source(family, rope_parameters=nested), counts)
    assert rope_parameters(found) == nested
    assert (found["rope_theta"], found["rope_local_base_freq"], found["rope_scaling"]) == (
        7000.0,
        500.0,
        YARN,
    )
    assert rope_parameters(export(found, [(1, 1), (2, 2)])) == nested


@both_counts
def test_scaled_gemma_3_of_transformers_4(counts: list[tuple[int, int]]) -> None:
    """Only full attention is scaled, and the other layers have a separate base."""
    linear = {"rope_type": "linear", "factor": 8.0}
    given = published("gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear)
    found = rope_parameters(export(given, counts))
    assert found["full_attention"] == linear | {"rope_theta": 1e6}
    assert found["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


def test_phi_3_with_long_factors() -> None:
    """Its stock class computes their number from hidden_size / heads, and refuses them once heads have left."""
    factors = [1.0, 2.0, 3.0]  # one for each pair of the 6 dimensions of a head
    long = {"type": "longrope", "short_factor": factors, "long_factor": factors}
    given = published("phi3", rope_scaling=long, original_max_position_embeddings=16)
    assert export(given, [(5, 13)] * 2)["model_type"] == "phi3"  # channels alone
    found = export(given, UNIFORM)
    assert (found["model_type"], shape_from_config(found, "exported").head_dim) == (
        "pruned_phi3",
        6,
    )
    assert rope_parameters(found) == rope_parameters(given)


@both_counts
@pytest.mark.parametrize("family", ["cohere2", "phi3", "granite", "qwen2", "olmo2", "starcoder2"])
def test_head_size_that_the_class_would_compute(family: str, counts: list[tuple[int, int]]) -> None:
    """Without the field it would be hidden_size / heads, which changes in a cut."""
    found = export(
        {key: value for key, value in source(family).items() if key != "head_dim"}, counts
    )
    head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
    assert found["head_dim"] == shape_from_config(found, "exported").head_dim == head_dim


# A Llama whose heads do not divide hidden_size becomes a Mistral. So fields are written that their defaults would hide

STOCK, STAND_IN = UNIFORM, [(4, 13), (4, 13)]  # 6 query heads divide 60, 8 do not
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_a_bias_becomes_no_mistral(bias: str) -> None:
    stand_in, pruned = (exported(source("llama", **{bias: x}), STAND_IN) for x in (False, True))
    assert (stand_in.config["model_type"], stand_in.modelling_file, stand_in.renamed) == (
        "mistral",
        None,
        True,
    )
    assert (pruned.config["model_type"], pruned.renamed) == ("pruned_llama", True)
    assert not exported(source("llama"), STOCK).renamed


def test_global_sizes_are_those_of_the_widest_layer() -> None:
    config = export(source("llama"), [(1, 13), (3, 2)])
    own = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 2}
    assert {key: config[key] for key in own} == own | {"intermediate_size": 13}
    assert config["per_layer_config"]["1"] == own


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_pruned_export_can_be_pruned_again(family: str) -> None:
    once = export(source(family), PER_LAYER)
    twice = export(once, [(2, 13), (1, 1)])
    assert twice["model_type"] == once["model_type"] == f"pruned_{family}"
    assert twice["per_layer_config"]["0"]["num_key_value_heads"] == 2
    uniform = export(once, [(1, 1)] * 2)
    assert uniform["model_type"] == family
    assert not {"per_layer_config", "auto_map"} & uniform.keys()
    assert uniform.get("sliding_window") == source(family).get("sliding_window")


def test_fields_of_the_source_s_files_leave() -> None:
    stale = {
        "quantization_config": {"bits": 4},
        "_name_or_path": "somewhere",
        "auto_map": {"AutoConfig": "x.Y"},
    }
    assert not stale.keys() & export(source("llama") | stale, STOCK).keys()


def test_sliding_window() -> None:
    llama, mistral = source("llama"), source("mistral")
    assert export(mistral | {"sliding_window": None}, PER_LAYER)["sliding_window"] is None
    assert (
        export(without(mistral, "sliding_window"), STOCK)["sliding_window"]
        == MistralConfig().sliding_window
    )
    assert export(llama, STAND_IN)["sliding_window"] is None  # a Llama in Mistral's class has none
    assert "sliding_window" not in export(llama, STOCK)


def test_silent_defaults_of_a_llama_are_written() -> None:
    silent = ("max_position_embeddings", "num_key_value_heads", "tie_word_embeddings")
    config = export(without(source("llama"), *silent), [(7, 13)] * 2)  # MHA now: 10 heads cut to 7
    assert config["model_type"] == "mistral"
    assert [config[key] for key in silent] == [LlamaConfig().max_position_embeddings, 7, False]


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "llama3"} | LLAMA3},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ],
)
@pytest.mark.parametrize("counts", [STOCK, STAND_IN])
def test_rotary_settings_of_a_llama_in_both_words(
    rope: dict[str, Any], counts: list[tuple[int, int]]
) -> None:
    given = published("llama", **rope)
    found, expected = export(given, counts), rope_parameters(given)
    assert rope_parameters(found) == expected
    assert found["rope_theta"] == expected.pop("rope_theta")
    assert found["rope_scaling"] == (None if expected["rope_type"] == "default" else expected)
