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
# config.json, and parameters in billions as published: all, and those that a token meets.
MIXTURES: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral-8x7B": (MIXTRAL | _sizes(4096, 14336, 32, 32), 46.7, 12.9),
    "Qwen3-30B-A3B": (QWEN_3_MOE | _sizes(2048, 6144, 48, 32) | {"moe_intermediate_size": 768}, 30.5, 3.3),
    "Qwen3-235B-A22B": (QWEN_3_MOE | _sizes(4096, 12288, 94, 64) | {"moe_intermediate_size": 1536}, 235, 22),
}
