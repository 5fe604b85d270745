"""Cuts tiny random models of all families, for the tools that serve such models."""

from pathlib import Path
from typing import Any

from loraprune_ds.export.huggingface import copy_tokenizer
from loraprune_ds.model.family import FAMILIES
from tests.support.export_cases import VOCAB
from tests.support.family_cuts import Export, export

# Rows that Q8_0 can hold. After a cut to 2 of 4 groups, heads have 64 rows and hidden_size // query heads is 24.
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 128}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
KEPT, KEPT_EXPERTS = (2, 96), (2, 7)
# llama.cpp takes a qwen2_moe's q_proj for hidden_size x hidden_size, and vLLM that of a granitemoe, too.
SQUARE, ALL_HEADS = ("qwen2_moe", "granitemoe", "cohere", "lfm2"), (4, 7)
# Those whose layers of one size vLLM serves, as test_vllm.py shows, and by which implementation.
# vLLM 0.32 computes even an uncut deepseek_v3 otherwise on a CPU, by 17 in a log probability. The others wait.
# It also ignores the correction of an ernie4_5_moe's router there: without it the logits are equal.
# Its transformers lacks internlm3 and iquestcoder. It has no encoder-decoders of text.
NOT_ASKED = "deepseek_v3 apertus qwen3_5_text qwen3_5_moe_text qwen3_next internlm3 iquestcoder minimax_m2".split()
NOT_ASKED += "deepseek_v2 glm4_moe_lite lfm2 helium granitemoehybrid nemotron_h gemma4_text t5 mt5 umt5".split()
NOT_ASKED += (
    "ernie4_5_moe dots1 hunyuan_v1_moe lfm3 lfm2_moe glm_moe_dsa mistral4 muse_glimmer_text".split()
)
VLLM: dict[str, str] = {
    name: family.vllm for name, family in FAMILIES.items() if name not in NOT_ASKED
}
VLLM_ANY_LAYERS = ("llama",)  # asked with SmolLM2, whose layers then differ
GROUPS = {"n_routed_experts": 24, "n_group": 4, "topk_group": 2}  # that a router first chooses from
# Keys as wide as values, and three value heads for each key head, as in Qwen3.6 27B.
NETS: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}
T5 = {
    "d_model": 96,
    "d_kv": 16,
    "d_ff": 128,
    "num_heads": 8,
    "relative_attention_max_distance": 128,
}
T5 |= {"num_layers": 3, "num_hidden_layers": 3, "num_decoder_layers": 2}
# Depths and settings that show a family's peculiarities.
SPECIAL: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]},
    "seed_oss": {"attention_bias": True},
    "gemma2": {"query_pre_attn_scalar": 30},
    "gemma3_text": {
        "num_hidden_layers": 7,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 30,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.4,
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3_moe": {"moe_intermediate_size": 64, "norm_topk_prob": True},  # as published
    "qwen2_moe": {"moe_intermediate_size": 64, "head_dim": 12, "decoder_sparse_step": 1},
    "dots1": {"moe_intermediate_size": 64, "num_key_value_heads": 8},
    "exaone_moe": {
        "moe_intermediate_size": 64,
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
    },
    "hunyuan_v1_moe": {"intermediate_size": 64},
    "glm4_moe": {"moe_intermediate_size": 64, "attention_bias": True},
    # Rows that Q8_0 cannot hold: llama.cpp multiplies by latent keys and values in another order. At these sizes no
    # router chooses by a hair. Else rounding in that order chooses another expert, and the text becomes another one.
    "deepseek_v3": {
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "head_dim": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "helium": {"head_dim": 12},
    "stablelm": {
        "head_dim": 12,
        "use_qkv_bias": True,
        "qk_layernorm": False,
        "partial_rotary_factor": 0.5,
    },
    "ernie4_5_moe": {"moe_intermediate_size": 64},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 128,
        "layer_types": ["full_attention"] * 2,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
        "mamba_d_head": 24,
    },
    "lfm2": {
        "head_dim": 12,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
    },
    "cohere": {"use_qk_norm": False, "head_dim": 12},
    "minimax_m2": {"intermediate_size": 64},
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), NETS),
    "olmoe": {"num_key_value_heads": 8, "head_dim": 12, "clip_qkv": None},
}

SPECIAL["glm4_moe_lite"] = SPECIAL["deepseek_v2"] = SPECIAL["deepseek_v3"]


def serve(
    family: str, folder: Path, tokenizer: Path, *counts: tuple[int, int], **changes: Any
) -> Export:
    """Writes the export of a cut model, with a tokenizer. Without counts all layers keep KEPT."""
    settings = SIZES | SPECIAL.get(family, {}) | changes
    kept = ALL_HEADS if family in SQUARE else KEPT_EXPERTS if FAMILIES[family].has_experts else KEPT
    layers = settings.get("num_hidden_layers", 2) + settings.get("num_decoder_layers", 0)
    made = export(family, folder, *counts or [kept] * layers, **settings)
    copy_tokenizer(tokenizer, folder)
    return made


def deep(layers: int, period: int) -> dict[str, Any]:
    """Returns the settings of a deep model. Each of number `period` attends to all tokens."""
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": types}
