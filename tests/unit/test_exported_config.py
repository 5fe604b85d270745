"""Checks config.json of a pruned Llama or Mistral, for every shape and age of the dense model's config.json."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from loraprune_ds.model.classes import config_object
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.read_shape import shape_from_config
from tests.published import sizes_of

LAYERS = 3
SOURCE = sizes_of("llama", 48, 50, LAYERS, 12, num_key_value_heads=4, vocab_size=100)
SOURCE |= {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
SOURCE |= {"max_position_embeddings": 64, "torch_dtype": "float16", "transformers_version": "4.31.0"}
MISTRAL = SOURCE | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7}
BIASES = {"attention_bias": True, "mlp_bias": True}
UNIFORM_2 = [(2, 30)] * LAYERS  # 6 query heads divide 48
UNIFORM_3 = [(3, 30)] * LAYERS  # 9 do not
PER_LAYER = [(3, 50), (1, 1), (2, 30)]


def export(source: dict[str, Any], keep: list[tuple[int, int]], dtype: str = "bfloat16") -> ExportedConfig:
    shape = shape_from_config(source, "source").resized([LayerCounts(heads=h, channels=c) for h, c in keep])
    return export_config(source, shape, dtype)


@pytest.mark.parametrize(
    ("source", "keep", "expected"),
    [
        (SOURCE, UNIFORM_2, "llama"),
        (SOURCE, UNIFORM_3, "mistral"),
        (SOURCE, PER_LAYER, "pruned_llama"),
        (SOURCE | BIASES, UNIFORM_2, "llama"),
        (SOURCE | BIASES, UNIFORM_3, "pruned_llama"),
        (SOURCE | {"mlp_bias": True}, UNIFORM_3, "pruned_llama"),
        (MISTRAL, UNIFORM_2, "mistral"),
        (MISTRAL, UNIFORM_3, "mistral"),
        (MISTRAL, PER_LAYER, "pruned_mistral"),
    ],
)
def test_model_type_and_sizes(source: dict[str, Any], keep: list[tuple[int, int]], expected: str) -> None:
    exported = export(source, keep)
    assert exported.config["model_type"] == expected
    assert exported.renamed == (expected != source["model_type"])
    shape = shape_from_config(exported.config, "exported")
    before = shape_from_config(source, "source")
    assert [(layer.key_value_heads, layer.counts["channels"]) for layer in shape.layers] == keep
    assert shape.biases == before.biases
    assert exported.config["head_dim"] == before.head_dim == 4
    assert (shape.hidden_size, shape.vocab_size, shape.attention[0].queries) == (48, 100, 3 * keep[0][0])
    assert exported.config["dtype"] == exported.config["torch_dtype"] == "bfloat16"
    pruned = expected.startswith("pruned_")
    assert exported.modelling_file == ("modeling_pruned.py" if pruned else None)
    assert ("trust_remote_code=True" in exported.loader) == pruned
    for_vllm = exported.config.get("auto_map", {}).get("AutoModel")  # transformers itself loads the other two
    assert for_vllm == ("modeling_pruned.PrunedModel" if pruned else None)


def test_global_sizes_are_those_of_the_widest_layer() -> None:
    config = export(SOURCE, [(1, 30), (3, 2), (2, 1)]).config
    sizes = (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"])
    assert sizes == (9, 3, 30)
    own = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 2}
    assert config["per_layer_config"]["1"] == own


@pytest.mark.parametrize("source", [SOURCE, MISTRAL])
def test_a_pruned_export_can_be_pruned_again(source: dict[str, Any]) -> None:
    once = export(source, PER_LAYER).config
    twice = export(once, [(2, 50), (1, 1), (1, 30)])
    assert twice.config["model_type"] == once["model_type"]
    assert twice.config["per_layer_config"]["0"]["num_key_value_heads"] == 2
    uniform = export(once, [(1, 1)] * LAYERS)
    assert uniform.config["model_type"] == source["model_type"]
    assert uniform.modelling_file is None
    assert not {"per_layer_config", "auto_map"} & uniform.config.keys()
    assert uniform.config.get("sliding_window") == source.get("sliding_window")


def test_tied_embeddings_are_stated_and_stale_fields_leave() -> None:
    assert export(SOURCE | {"tie_word_embeddings": True}, PER_LAYER).config["tie_word_embeddings"] is True
    assert export(SOURCE, PER_LAYER).config["tie_word_embeddings"] is False  # the default
    stale = {"quantization_config": {"bits": 4}, "_name_or_path": "somewhere", "auto_map": {"AutoConfig": "x.Y"}}
    assert not stale.keys() & export(SOURCE | stale, UNIFORM_2).config.keys()


def test_sliding_window() -> None:
    assert export(MISTRAL | {"sliding_window": None}, PER_LAYER).config["sliding_window"] is None
    silent = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert export(silent, UNIFORM_2).config["sliding_window"] == MistralConfig().sliding_window
    assert export(SOURCE, UNIFORM_3).config["sliding_window"] is None  # a Llama in Mistral's class has none
    assert "sliding_window" not in export(SOURCE, UNIFORM_2).config


def test_silent_defaults_of_the_source_family_are_written() -> None:
    """Guards against the stand-in class, which assumes other values where config.json says nothing."""
    silent = {k: v for k, v in SOURCE.items() if k not in ("max_position_embeddings", "num_key_value_heads")}
    config = export(silent, [(5, 30)] * LAYERS).config  # MHA now: 12 heads cut to 5
    assert config["model_type"] == "mistral"
    assert config["max_position_embeddings"] == LlamaConfig().max_position_embeddings
    assert config["num_key_value_heads"] == 5


LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("rope", "theta", "rope_type"),
    [
        ({}, 10000.0, "default"),
        ({"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5000.0, "linear"),
        ({"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 5000.0, "llama3"),
        ({"rope_parameters": {"rope_theta": 5000.0, "rope_type": "llama3"} | LLAMA3}, 5000.0, "llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 10000.0, "dynamic"),
    ],
)
@pytest.mark.parametrize("keep", [UNIFORM_2, UNIFORM_3])
def test_rope_in_the_words_of_transformers_4_and_5(
    rope: dict[str, Any], theta: float, rope_type: str, keep: list[tuple[int, int]]
) -> None:
    source = SOURCE | rope
    config = export(source, keep).config
    scaling = config["rope_scaling"] or {"rope_type": "default"}  # 4.x
    assert (config["rope_theta"], scaling["rope_type"]) == (theta, rope_type)
    assert not {"rope_theta", "type"} & scaling.keys()
    expected: dict[str, Any] = LlamaConfig.from_dict(source).to_dict()["rope_parameters"]
    expected.pop("type", None)  # an older name that transformers keeps next to rope_type
    assert config_object(config).rope_parameters == expected  # 5.x
    assert config_object(config).dtype == torch.bfloat16
