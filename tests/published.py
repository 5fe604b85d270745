"""Sizes of published models, as in their config.json on the Hugging Face hub. Defaults of transformers are left out.

Llama 3.3 70B has the sizes of Llama 3.1 70B.
"""

from typing import Any

LLAMA_3: dict[str, Any] = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
QWEN_3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
}


def _sizes(hidden: int, channels: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": channels,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


# By the name of the run config in launch/configs: config.json, and parameters as published, in billions.
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "llama3.1-8b": (LLAMA_3 | _sizes(4096, 14336, 32, 32), 8.03),
    "llama3.3-70b": (LLAMA_3 | _sizes(8192, 28672, 80, 64), 70.6),
    "qwen3-8b": (QWEN_3 | _sizes(4096, 12288, 36, 32), 8.2),
    "qwen3-32b": (QWEN_3 | _sizes(5120, 25600, 64, 64), 32.8),
    "gemma3-27b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "model_type": "gemma3_text",
                "num_key_value_heads": 16,
                "head_dim": 128,
                "vocab_size": 262_208,
                "query_pre_attn_scalar": 168,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
                **_sizes(5376, 21504, 62, 32),
            },
        },
        27.0,
    ),
}

QWEN_3_MOE: dict[str, Any] = QWEN_3 | {
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201_088,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131_072,
    "rope_theta": 150_000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "sliding_window": 128,
}
QWEN_2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "num_key_value_heads": 16,
    "vocab_size": 151_936,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "num_key_value_heads": 16,
    "vocab_size": 50_304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
GRANITE_MOE: dict[str, Any] = {
    "model_type": "granitemoe",
    "num_key_value_heads": 8,
    "vocab_size": 49_155,
    "num_local_experts": 40,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": True,
}
# config.json, and parameters in billions as published: all, and those that a token meets. GPT-OSS publishes the latter
# without the embedding, which is added here.
MIXTURES: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral-8x7B": (MIXTRAL | _sizes(4096, 14336, 32, 32), 46.7, 12.9),
    "Qwen3-30B-A3B": (QWEN_3_MOE | _sizes(2048, 6144, 48, 32) | {"moe_intermediate_size": 768}, 30.5, 3.3),
    "Qwen1.5-MoE-A2.7B": (QWEN_2_MOE | _sizes(2048, 5632, 24, 16), 14.3, 2.7),
    "OLMoE-1B-7B": (OLMOE | _sizes(2048, 1024, 16, 16), 6.92, 1.28),
    "granite-3.0-3b-a800m": (GRANITE_MOE | _sizes(1536, 512, 32, 24), 3.3, 0.88),
    "gpt-oss-20b": (GPT_OSS | _sizes(2880, 2880, 24, 64) | {"num_local_experts": 32}, 20.91, 3.61 + 0.58),
    "gpt-oss-120b": (GPT_OSS | _sizes(2880, 2880, 36, 64) | {"num_local_experts": 128}, 116.83, 5.13 + 0.58),
    "Qwen3-235B-A22B": (QWEN_3_MOE | _sizes(4096, 12288, 94, 64) | {"moe_intermediate_size": 1536}, 235, 22),
}
