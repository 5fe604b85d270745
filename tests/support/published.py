"""Sizes of published models, as in their config.json on the hub. Llama 3.3 70B has those of 3.1 70B."""

from typing import Any


def sizes_of(
    model_type: str, hidden: int, channels: int, layers: int, heads: int, **others: Any
) -> dict[str, Any]:
    """Returns the fields of config.json that every model has, and others."""
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "num_hidden_layers": layers}
    return {"model_type": model_type, **sizes, "num_attention_heads": heads, **others}


LLAMA_3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
}
LLAMA_3 |= {
    "rope_theta": 500_000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
}
LLAMA_3["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN_3: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
QWEN_3 |= {"max_position_embeddings": 40_960, "rope_theta": 1_000_000, "tie_word_embeddings": False}
GEMMA_3: dict[str, Any] = {
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 262_208,
    "sliding_window": 1024,
}
GEMMA_3 |= {"query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
# The sizes that both have. Three of four layers are delta nets: that is their class's default, with heads of 128.
QWEN_3_6: dict[str, Any] = {"head_dim": 256, "linear_num_key_heads": 16, "vocab_size": 248_320}
QWEN_3_6 |= {
    "max_position_embeddings": 262_144,
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
# The sizes that both have. Every sixth layer has full attention, whose values are its keys.
GEMMA_4: dict[str, Any] = {
    "head_dim": 256,
    "global_head_dim": 512,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
}
GEMMA_4 |= {
    "hidden_size_per_layer_input": 0,
    "vocab_size": 262_144,
    "max_position_embeddings": 262_144,
}
GEMMA_4 |= {"final_logit_softcapping": 30.0}
GLM_LITE: dict[str, Any] = {
    "num_key_value_heads": 20,
    "vocab_size": 154_880,
    "max_position_embeddings": 202_752,
}
GLM_LITE |= {
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1536,
}
GLM_LITE |= {
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
}
GLM_LITE |= {"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}
GPT_OSS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201_088,
    "num_experts_per_tok": 4,
}
GPT_OSS |= {"max_position_embeddings": 131_072, "sliding_window": 128, "rope_theta": 150_000}
GPT_OSS["rope_scaling"] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
GPT_OSS["rope_scaling"] |= {"original_max_position_embeddings": 4096}
FLAN_T5_XL: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 2048,
    "d_ff": 5120,
    "d_kv": 64,
    "num_heads": 32,
}
FLAN_T5_XL |= {
    "num_layers": 24,
    "vocab_size": 32_128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
T5_11B = FLAN_T5_XL | {
    "d_model": 1024,
    "d_ff": 65_536,
    "d_kv": 128,
    "num_heads": 128,
    "tie_word_embeddings": True,
}
T5_11B |= {"feed_forward_proj": "relu"}
QWEN_3_VL = QWEN_3 | {"max_position_embeddings": 262_144, "rope_theta": 5_000_000}
QWEN_3_6_27B = QWEN_3_6 | {"num_key_value_heads": 4, "linear_num_value_heads": 48}
QWEN_3_6_MOE = QWEN_3_6 | {"num_key_value_heads": 2, "linear_num_value_heads": 32}
QWEN_3_6_MOE |= {"num_experts": 256, "num_experts_per_tok": 8}
QWEN_3_6_MOE |= {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
QWEN_3_6_35B = sizes_of("qwen3_5_moe_text", 2048, 512, 40, 16, **QWEN_3_6_MOE)
GEMMA_4_31B = GEMMA_4 | {"num_key_value_heads": 16, "num_global_key_value_heads": 4}
GEMMA_4_MOE = GEMMA_4 | {
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
}
GEMMA_4_MOE |= {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
# Three of four layers have a window, counted from the last: that is its class's default.
MUSE: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 202_048,
    "sliding_window": 2048,
}
MUSE |= {"max_position_embeddings": 131_072, "tie_word_embeddings": False}
MUSE_GLIMMER = sizes_of("muse_glimmer_text", 6656, 19_968, 52, 32, **MUSE)
QWEN_3_MOE = QWEN_3 | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8}
MIXTRAL = {
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN_2_MOE = {
    "num_key_value_heads": 16,
    "vocab_size": 151_936,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
QWEN_2_MOE |= {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
OLMOE = {
    "num_key_value_heads": 16,
    "vocab_size": 50_304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
ERNIE: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 103_424,
    "moe_num_experts": 64,
    "moe_k": 8,
}
ERNIE |= {"moe_intermediate_size": 3584, "moe_num_shared_experts": 0, "moe_layer_start_index": 3}
ERNIE |= {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}
DOTS: dict[str, Any] = {"num_key_value_heads": 32, "vocab_size": 152_064, "n_routed_experts": 128}
DOTS |= {
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
}
HUNYUAN: dict[str, Any] = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_167,
    "num_experts": 64,
}
HUNYUAN |= {"moe_topk": [8] * 32, "num_shared_expert": [1] * 32, "tie_word_embeddings": True}
GRANITE = {
    "num_key_value_heads": 8,
    "vocab_size": 49_155,
    "num_local_experts": 40,
    "num_experts_per_tok": 8,
}


# One mixer in each of 52 or 42 layers. The expert's width is also in `intermediate_size`.
NEMOTRON_3: dict[str, Any] = {
    "head_dim": 128,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "vocab_size": 131_072,
}
NEMOTRON_3 |= {
    "mlp_hidden_act": "relu2",
    "max_position_embeddings": 262_144,
    "tie_word_embeddings": False,
}
NEMOTRON_3_MOE = NEMOTRON_3 | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
}
NEMOTRON_3_MOE |= {
    "num_key_value_heads": 2,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_routed_experts": 128,
}
NEMOTRON_3_MOE |= {
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}
NEMOTRON_3_4B = NEMOTRON_3 | {
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
}
NEMOTRON_3_4B |= {"num_key_value_heads": 8, "mamba_num_heads": 96, "mamba_head_dim": 80}


def multimodal(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json of a model with a tower."""
    return {
        "model_type": model_type,
        "text_config": text,
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
    }


# By the name of the run config in launch/configs: config.json, and parameters as published, in billions. Towers and
# layers for further tokens do not count: of Qwen3.6 27B's 27.781 in all, 0.461 and 0.425. llama.cpp counts those of
# Gemma 4 and GLM-4.7-Flash in their weights. Muse-Glimmer's number is that of its class.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "llama3.1-8b": (sizes_of("llama", 4096, 14336, 32, 32, **LLAMA_3), 8.03),
    "llama3.3-70b": (sizes_of("llama", 8192, 28672, 80, 64, **LLAMA_3), 70.6),
    "qwen3-8b": (sizes_of("qwen3", 4096, 12288, 36, 32, **QWEN_3), 8.2),
    "qwen3-32b": (sizes_of("qwen3", 5120, 25600, 64, 64, **QWEN_3), 32.8),
    "gemma3-27b": (
        multimodal("gemma3", sizes_of("gemma3_text", 5376, 21504, 62, 32, **GEMMA_3)),
        27.0,
    ),
    "qwen3-vl-8b": (
        multimodal("qwen3_vl", sizes_of("qwen3_vl_text", 4096, 12288, 36, 32, **QWEN_3_VL)),
        8.191,
    ),
    "qwen3.6-27b": (
        multimodal("qwen3_5", sizes_of("qwen3_5_text", 5120, 17408, 64, 24, **QWEN_3_6_27B)),
        26.896,
    ),
    "qwen3.6-35b-a3b": (multimodal("qwen3_5_moe", QWEN_3_6_35B), 34.661),
    "gemma4-31b": (
        multimodal("gemma4", sizes_of("gemma4_text", 5376, 21504, 60, 32, **GEMMA_4_31B)),
        30.70,
    ),
    "gemma4-26b-a4b": (
        multimodal("gemma4", sizes_of("gemma4_text", 2816, 2112, 30, 16, **GEMMA_4_MOE)),
        25.23,
    ),
    "muse-glimmer-30b": (multimodal("muse_glimmer", MUSE_GLIMMER), 27.85),
    "flan-t5-xl": (FLAN_T5_XL, 2.85),
    "glm-4.7-flash": (sizes_of("glm4_moe_lite", 2048, 10240, 47, 20, **GLM_LITE), 29.94),
}
NEMOTRON_3_NANO_4B = sizes_of("nemotron_h", 3136, 12544, 42, 40, **NEMOTRON_3_4B), 3.97
# config.json, and parameters in billions as published: all, and the active ones. GPT-OSS publishes the latter without
# the embedding, which is added here.
MIXTURES: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral-8x7B": (sizes_of("mixtral", 4096, 14336, 32, 32, **MIXTRAL), 46.7, 12.9),
    "Qwen3-30B-A3B": (
        sizes_of("qwen3_moe", 2048, 6144, 48, 32, moe_intermediate_size=768, **QWEN_3_MOE),
        30.5,
        3.3,
    ),
    "Qwen1.5-MoE-A2.7B": (sizes_of("qwen2_moe", 2048, 5632, 24, 16, **QWEN_2_MOE), 14.3, 2.7),
    "OLMoE-1B-7B": (sizes_of("olmoe", 2048, 1024, 16, 16, **OLMOE), 6.92, 1.28),
    "granite-3.0-3b-a800m": (
        sizes_of("granitemoe", 1536, 512, 32, 24, tie_word_embeddings=True, **GRANITE),
        3.3,
        0.88,
    ),
    "ERNIE-4.5-300B-A47B": (sizes_of("ernie4_5_moe", 8192, 28_672, 54, 64, **ERNIE), 300, 47),
    "dots.llm1": (
        sizes_of("dots1", 4096, 10_944, 62, 32, tie_word_embeddings=False, **DOTS),
        143,
        14,
    ),
    "Hunyuan-A13B": (sizes_of("hunyuan_v1_moe", 4096, 3072, 32, 32, **HUNYUAN), 80.4, 13),
    "gpt-oss-20b": (
        sizes_of("gpt_oss", 2880, 2880, 24, 64, num_local_experts=32, **GPT_OSS),
        20.91,
        3.61 + 0.58,
    ),
    "gpt-oss-120b": (
        sizes_of("gpt_oss", 2880, 2880, 36, 64, num_local_experts=128, **GPT_OSS),
        116.83,
        5.13 + 0.58,
    ),
    "Nemotron-3-Nano-30B-A3B": (
        sizes_of("nemotron_h", 2688, 1856, 52, 32, **NEMOTRON_3_MOE),
        31.6,
        3.6,
    ),
    "Qwen3-235B-A22B": (
        sizes_of("qwen3_moe", 4096, 12288, 94, 64, moe_intermediate_size=1536, **QWEN_3_MOE),
        235,
        22,
    ),
}
