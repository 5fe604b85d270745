"""Reads GGUF files of other families back. tests/run_heavy.sh shows that llama.cpp computes the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from loraprune_ds.export.gguf import write_gguf
from loraprune_ds.export.gguf_architecture import ARCHITECTURES
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_pretrained
from loraprune_ds.pretrained.read_shape import read_model
from loraprune_ds.pretrained.weights import ModelWeights
from tests.integration.heavy.families import GROUPS, deep, serve
from tests.support.export_cases import LINEAR, VOCAB
from tests.support.families import YARN, is_seq2seq, tiny_config
from tests.support.gguf_cases import byte_level_tokenizer, value
from tests.support.refusals import must_name
from tests.support.resuming import read_tensors

pytestmark = pytest.mark.usefixtures("fresh_transformers")
Tensors = dict[str, np.ndarray]
UNEVEN = YARN["rope_parameters"] | {"mscale": 0.7, "mscale_all_dim": 1.0}


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB)

    def made(
        family: str, *counts: tuple[int, int], **changes: Any
    ) -> tuple[GGUFReader, Tensors, Tensors]:
        """Returns the file, its tensors, and the tensors of the model."""
        root = tmp_path_factory.mktemp(family)
        serve(family, root / "model", tokenizer, *counts, **changes)
        write_gguf(open_pretrained(root / "model"), root / "model.gguf", "f16", "tiny")
        reader = GGUFReader(root / "model.gguf")
        found = {tensor.name: tensor.data for tensor in reader.tensors}
        assert len(found) == len(reader.tensors)
        return (
            reader,
            found,
            {name: tensor.numpy() for name, tensor in read_tensors(root / "model").items()},
        )

    return made


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_value_is_there_once(family: str, convert: Any) -> None:
    _, found, sources = convert(family)
    # of a scaled rotary embedding, which config.json describes
    found.pop("rope_freqs.weight", None)
    if is_seq2seq(family) and "lm_head.weight" not in sources:
        found.pop("output.weight")  # a scaled copy
    assert sum(tensor.size for tensor in found.values()) == sum(
        tensor.size for tensor in sources.values()
    )


def test_a_fused_linear_comes_apart(convert: Any) -> None:
    reader, found, sources = convert("phi3", (2, 96), (3, 77))
    assert value(reader, "general.architecture") == "deci"
    heads, channels = 3, 77
    fused = sources["model.layers.1.self_attn.qkv_proj.weight"].astype(np.float16)
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"], fused[-heads * 16 :])
    # the two rows of each rotary pair, side by side
    pairs = found["blk.1.attn_k.weight"].reshape(heads, 8, 2, -1)
    halves = fused[-2 * heads * 16 : -heads * 16].reshape(heads, 2, 8, -1)
    np.testing.assert_array_equal(pairs.swapaxes(1, 2), halves)
    fused = sources["model.layers.1.mlp.gate_up_proj.weight"].astype(np.float16)
    np.testing.assert_array_equal(found["blk.1.ffn_gate.weight"], fused[:channels])
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"], fused[channels:])


def test_experts_come_apart(convert: Any) -> None:
    """Gate and up are apart in llama.cpp. GPT-OSS stores their outputs in turn, and its matrices transposed."""
    reader, found, sources = convert("mixtral")
    assert value(reader, "llama.expert_count") == 7
    assert value(reader, "llama.expert_used_count") == 3
    block = "model.layers.1.block_sparse_moe"
    for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        wanted = np.stack([sources[f"{block}.experts.{i}.{theirs}.weight"] for i in range(7)])
        np.testing.assert_array_equal(
            found[f"blk.1.ffn_{ours}_exps.weight"], wanted.astype(np.float16)
        )
    np.testing.assert_array_equal(
        found["blk.1.ffn_gate_inp.weight"], sources[f"{block}.gate.weight"]
    )

    reader, found, sources = convert("gpt_oss")
    block = "model.layers.1.mlp"
    for ours, start in (("gate", 0), ("up", 1)):
        wanted = sources[f"{block}.experts.gate_up_proj"][:, :, start::2].swapaxes(1, 2)
        np.testing.assert_array_equal(
            found[f"blk.1.ffn_{ours}_exps.weight"], wanted.astype(np.float16)
        )
        wanted = sources[f"{block}.experts.gate_up_proj_bias"][:, start::2]
        np.testing.assert_array_equal(found[f"blk.1.ffn_{ours}_exps.bias"], wanted)
    wanted = sources[f"{block}.experts.down_proj"].swapaxes(1, 2)
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"], wanted.astype(np.float16))
    np.testing.assert_array_equal(
        found["blk.1.attn_sinks.weight"], sources["model.layers.1.self_attn.sinks"]
    )
    assert value(reader, "gpt-oss.rope.scaling.type") == "yarn"


def test_latent_keys_and_values_come_apart(convert: Any) -> None:
    """The keys' rows are transposed. The first layer is dense, and the correction of a router is a bias."""
    rope = YARN["rope_parameters"] | {"mscale_all_dim": 1.0, "mscale": 1.0}
    reader, found, sources = convert("deepseek_v3", rope_parameters=rope)
    block = "model.layers.1"
    both = sources[f"{block}.self_attn.kv_b_proj.weight"].reshape(2, 16 + 12, 40).astype(np.float16)
    np.testing.assert_array_equal(found["blk.1.attn_k_b.weight"], both[:, :16].swapaxes(1, 2))
    np.testing.assert_array_equal(found["blk.1.attn_v_b.weight"], both[:, 16:])
    np.testing.assert_array_equal(
        found["blk.1.exp_probs_b.bias"], sources[f"{block}.mlp.gate.e_score_correction_bias"]
    )
    wanted = {
        "leading_dense_block_count": 1,
        "feed_forward_length": 128,
        "expert_feed_forward_length": 64,
        "expert_count": 7,
        "expert_gating_func": 2,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 40 + 8,
        "attention.value_length": 40,
        "attention.key_length_mla": 16 + 8,
        "attention.value_length_mla": 12,
        "rope.dimension_count": 8,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.1),
    }
    assert {key: value(reader, f"deepseek2.{key}") for key in wanted} == wanted
    assert value(convert("glm4_moe")[0], "glm4moe.rope.dimension_count") == 8


def test_value_heads_of_delta_nets_change_places(convert: Any) -> None:
    """llama.cpp has the first value head of each key head, then the second of each. Here 2 keys have 3 values each."""
    reader, found, sources = convert("qwen3_5_text")
    name = "model.layers.2.linear_attn"

    def in_order(of_values: np.ndarray) -> np.ndarray:
        heads = of_values.reshape(2, 3, -1, *of_values.shape[1:])
        return np.stack([heads[key, i] for i in range(3) for key in range(2)]).reshape(
            of_values.shape
        )

    rows = {
        "in_proj_z.weight": "attn_gate",
        "in_proj_a.weight": "ssm_alpha",
        "in_proj_b.weight": "ssm_beta",
    }
    for ours, theirs in rows.items():
        wanted = in_order(sources[f"{name}.{ours}"]).astype(np.float16)
        np.testing.assert_array_equal(found[f"blk.2.{theirs}.weight"], wanted)
    for ours, theirs, kind in (
        ("in_proj_qkv", "attn_qkv", np.float16),
        ("conv1d", "ssm_conv1d", np.float32),
    ):
        keys, of_values = np.split(sources[f"{name}.{ours}.weight"].squeeze(), [2 * 2 * 16])
        wanted = np.concatenate([keys, in_order(of_values)]).astype(kind)
        np.testing.assert_array_equal(found[f"blk.2.{theirs}.weight"], wanted)
    columns = in_order(sources[f"{name}.out_proj.weight"].T).T
    np.testing.assert_array_equal(found["blk.2.ssm_out.weight"], columns.astype(np.float16))
    np.testing.assert_array_equal(found["blk.2.ssm_dt.bias"], in_order(sources[f"{name}.dt_bias"]))
    np.testing.assert_allclose(
        found["blk.2.ssm_a"], -np.exp(in_order(sources[f"{name}.A_log"])), rtol=1e-6
    )
    np.testing.assert_array_equal(found["blk.2.ssm_norm.weight"], sources[f"{name}.norm.weight"])
    np.testing.assert_allclose(
        found["blk.3.attn_q_norm.weight"], sources["model.layers.3.self_attn.q_norm.weight"] + 1
    )
    wanted = {
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.state_size": 16,
        "ssm.inner_size": 96,
    }
    wanted |= {
        "ssm.conv_kernel": 4,
        "full_attention_interval": 2,
        "attention.head_count": 4,
        "rope.dimension_count": 4,
    }
    assert {key: value(reader, f"qwen35.{key}") for key in wanted} == wanted


@pytest.mark.parametrize(("layers", "divisor"), [(7, 16), (62, 24)])
def test_norms_and_attention_scale_of_gemma3(layers: int, divisor: int, convert: Any) -> None:
    """llama.cpp divides scores by sqrt(head_dim), but by sqrt(hidden_size // query heads) in a Gemma 3 of 62 layers."""
    reader, found, sources = convert("gemma3_text", **deep(layers, 6), query_pre_attn_scalar=30)
    norm = sources["model.layers.3.input_layernorm.weight"]
    np.testing.assert_allclose(found["blk.3.attn_norm.weight"], norm + 1, rtol=1e-6)
    norm = sources["model.layers.3.self_attn.q_norm.weight"]
    np.testing.assert_allclose(
        found["blk.3.attn_q_norm.weight"], (norm + 1) * (divisor / 30) ** 0.5, rtol=1e-6
    )
    wanted = {"attention.sliding_window": 8, "context_length": 64}
    wanted |= {"rope.freq_base": 5e5, "rope.freq_base_swa": 1e4, "rope.scaling.factor": 8.0}
    assert {key: value(reader, f"gemma3.{key}") for key in wanted} == wanted


def test_a_window_that_is_off_limits_no_context(convert: Any) -> None:
    assert value(convert("qwen2_moe")[0], "qwen2moe.context_length") == 64


def test_numbers_of_granite(convert: Any) -> None:
    reader, *_ = convert("granite")
    keys = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert [value(reader, f"granite.{key}") for key in keys] == pytest.approx([0.1, 3.0, 0.4, 3.0])


LINEARS_FIRST = ["full_attention", *["linear_attention"] * 4]


@pytest.mark.parametrize(
    ("family", "counts", "changes", "names"),
    [
        ("llama", (), {"hidden_act": "gelu"}, "llama hidden_act 'gelu'"),
        ("llama", (), YARN, "rope yarn"),
        (
            "llama",
            (),
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial rotary",
        ),
        ("qwen3", ((2, 96), (3, 77)), {}, "qwen3 size"),
        ("qwen3", (), {"attention_bias": True}, "qwen3 self_attn.k_proj bias"),
        ("gemma2", (), deep(2, 1), "gemma2 layer_types"),
        ("smollm3", (), {"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ("gemma", (), {"tie_word_embeddings": False}, "gemma lm_head.weight"),
        ("seed_oss", (), {"rope_parameters": LINEAR}, "rope linear"),
        ("qwen3_moe", (), {"norm_topk_prob": False}, "qwen3moe norm_topk_prob False"),
        ("qwen2_moe", ((2, 7), (2, 7)), {}, "qwen2moe self_attn.q_proj 48"),
        ("glm4_moe", ((2, 8), (2, 8)), GROUPS, "glm4moe n_group 4"),
        ("qwen3_5_text", (), {"linear_value_head_dim": 8}, "linear_value_head_dim 8 16"),
        ("qwen3_5_text", (), {"layer_types": LINEARS_FIRST}, "layer_types"),
        ("stablelm", (), {"qk_layernorm": True}, "stablelm qk_layernorm True"),
        (
            "ernie4_5_moe",
            (),
            {"num_hidden_layers": 4, "moe_layer_interval": 2},
            "ernie4_5-moe dense [0, 2]",
        ),
        ("deepseek_v3", (), {"q_lora_rank": None}, "deepseek2 2 q_lora_rank None"),
        ("deepseek_v3", (), {"num_hidden_layers": 26}, "deepseek2 26 q_lora_rank 32"),
        ("deepseek_v3", (), {"rope_parameters": UNEVEN}, "yarn mscale"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused(
    family: str,
    counts: tuple[tuple[int, int], ...],
    changes: dict[str, Any],
    names: str,
    convert: Any,
) -> None:
    must_name(f"{names} hf, adapter", convert, family, *counts, **changes)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ARCHITECTURES.keys()))
def test_no_gguf_of_other_families(family: str, tmp_path: Path) -> None:
    config = tiny_config(family).to_dict()
    shape, modules = read_model(config, family)
    pretrained = PretrainedModel(tmp_path, config, modules, ModelWeights(shape, {}, {}, {}))
    must_name(family, write_gguf, pretrained, tmp_path / "model.gguf", "f16", family)
    assert not list(tmp_path.iterdir())
