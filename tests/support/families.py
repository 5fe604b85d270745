"""Random tiny models of every family: grouped queries, odd counts, and every special field in use."""

import os
from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from loraprune_ds.model.classes import causal_lm_class, config_object
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.families.base import Family, Marks
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.groups import QUERY_HEADS, LayerCounts, TensorSpec
from loraprune_ds.model.shape import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"head_dim": 10}  # not hidden_size / num_attention_heads, which is 6
WINDOW = {"sliding_window": 8}
BOTH = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
GEMMA = WIDE | BOTH | {"query_pre_attn_scalar": 10}
YARN: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
    }
}
SCALED = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 3.0,
}
DELTA = {
    "head_dim": 12,  # of which a quarter is rotary
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 5,
    "linear_num_value_heads": 10,
    "layer_types": ["linear_attention", "full_attention"],
}
SPARSE = {"moe_intermediate_size": 8, "num_experts": 23, "num_experts_per_tok": 3}
LATENT = {
    "num_attention_heads": 5,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 8,
    "n_routed_experts": 23,
    "num_experts_per_tok": 3,
}
GROUPED = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
T5 = {
    "d_model": 60,
    "d_kv": 8,  # 5 times 8 is not d_model
    "d_ff": 23,
    **dict.fromkeys(("num_heads", "num_attention_heads"), 5),
    **dict.fromkeys(("num_layers", "num_hidden_layers"), 1),
    "num_decoder_layers": 1,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
OWN_HEAD = {"tie_word_embeddings": False}  # as most published ones
# More fields of config.json. The caps and factors are such that a model without them is clearly another one.
TINY: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": WIDE | WINDOW,
    "ministral": WIDE | WINDOW,
    "ministral3": WIDE,
    "qwen2": {},
    "qwen3": WIDE,
    "smollm3": {"no_rope_layers": [1, 0]},
    # else both are random while it trains
    "seed_oss": WIDE | {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "helium": {"head_dim": 6},
    "stablelm": {
        "head_dim": 6,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "partial_rotary_factor": 0.67,
    },
    "olmo": {"clip_qkv": 0.1},
    "exaone4": BOTH,
    "ernie4_5": WIDE,
    "hunyuan_v1_dense": WIDE,
    **dict.fromkeys(("cwm", "internlm3", "iquestcoder"), WIDE),
    "gemma": WIDE | {"num_attention_heads": 5, "num_key_value_heads": 1},
    "gemma2": GEMMA | {"final_logit_softcapping": 8.0, "attn_logit_softcapping": 1.5},
    "vaultgemma": GEMMA | {"final_logit_softcapping": 8.0, "attn_logit_softcapping": 1.5},
    "gemma3_text": GEMMA | {"final_logit_softcapping": 10.0},
    "granite": SCALED,
    "hyperclovax": WIDE | SCALED | {"logits_scaling": 0.3},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "cohere2": WIDE | BOTH | {"logit_scale": 0.3},
    "olmo2": {},
    "olmo3": BOTH,
    "muse_glimmer_text": BOTH
    | {"head_dim": 6, "num_attention_heads": 5, "num_key_value_heads": 1}
    | {
        "layer_rope_theta": [1e4, 0],
        "output_multiplier": 0.3,
        "final_logit_softcapping": 8.0,
        "qk_scale_factor": 2.0,
    },
    "phi3": {},
    "glm": WIDE | {"attention_bias": True},
    "glm4": WIDE | {"attention_bias": True, "num_key_value_heads": 2},
    "starcoder2": {},
    "arcee": WIDE,
    "nemotron": WIDE,
    "apertus": WIDE,
    "jais2": WIDE,
    "minimax_m2": WIDE
    | {"intermediate_size": 8, "num_local_experts": 23, "num_experts_per_tok": 3, "rotary_dim": 6},
    "mixtral": WIDE | {"intermediate_size": 8, "num_local_experts": 23, "num_experts_per_tok": 3},
    "qwen3_moe": WIDE | SPARSE,
    "qwen2_moe": SPARSE
    | {
        "shared_expert_intermediate_size": 11,
        "decoder_sparse_step": 2,  # every other layer is dense
    },
    "glm4_moe": {
        "head_dim": 12,  # of which half is rotary
        "use_qk_norm": True,
        "moe_intermediate_size": 8,
        "n_routed_experts": 23,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": WIDE | {"moe_intermediate_size": 8, "moe_num_experts": 23, "moe_k": 3},
    "deepseek_v3": LATENT | GROUPED,
    "deepseek_v2": LATENT | GROUPED | {"hidden_size": 30},  # 4 heads do not divide it
    "mistral4": LATENT | GROUPED,
    "glm4_moe_lite": LATENT | {"intermediate_size": 31},
    "dots1": WIDE
    | {
        "moe_intermediate_size": 8,
        "n_routed_experts": 23,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
    }
    | {"routed_scaling_factor": 1.5, "first_k_dense_replace": 1},
    "exaone_moe": WIDE | BOTH | SPARSE | {"first_k_dense_replace": 1, "tie_word_embeddings": False},
    "hunyuan_v1_moe": WIDE | {"intermediate_size": 8, "num_experts": 23, "moe_topk": 3},
    "lfm2_moe": SPARSE
    | {
        "head_dim": 6,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "routed_scaling_factor": 1.5,
    },
    "lfm3": WIDE
    | {"layer_types": ["conv", "sliding_attention", "full_attention"], "num_hidden_layers": 3}
    | WINDOW,
    "glm_moe_dsa": LATENT
    | {
        "intermediate_size": 31,
        "first_k_dense_replace": 1,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
    }
    | {"indexer_types": ["full", "shared"], "mlp_layer_types": ["dense", "sparse"]},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | SPARSE | {"shared_expert_intermediate_size": 11},
    "qwen3_next": DELTA | SPARSE | {"shared_expert_intermediate_size": 11},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": SCALED
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 23,
        "mamba_n_heads": 10,
        "mamba_d_state": 6,
        "mamba_chunk_size": 8,
        "mamba_d_head": 12,
    },
    "nemotron_h": WIDE
    | {
        "hybrid_override_pattern": "M*-E*",
        "num_hidden_layers": 5,
        "mamba_num_heads": 10,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "ssm_state_size": 6,
        "chunk_size": 8,
        "n_routed_experts": 23,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 11,
        "moe_latent_size": 20,
        "routed_scaling_factor": 1.5,
    },
    "gemma4_text": BOTH
    | SPARSE
    | {
        "enable_moe_block": True,
        "head_dim": 8,
        "global_head_dim": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "top_k_experts": 3,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 97,
        "final_logit_softcapping": 10.0,
    },
    "t5": T5,
    "mt5": T5 | OWN_HEAD,
    "umt5": T5,
    "olmoe": {"intermediate_size": 8, "num_experts": 23, "num_experts_per_tok": 3, "clip_qkv": 0.5},
    "granitemoe": SCALED
    | {"intermediate_size": 8, "num_local_experts": 23, "num_experts_per_tok": 3},
    "gpt_oss": WIDE
    | BOTH
    | YARN
    | {"intermediate_size": 8, "num_local_experts": 23, "num_experts_per_tok": 3},
}
COARSE = ("heads", "delta", "cross_heads", QUERY_HEADS)


class LlamaLinear(NamedTuple):
    """A linear of a LLaMA's layer: the kind of its groups, the axis that loses them, whether these are query heads."""

    name: str
    kind: str
    axis: int
    queries: bool = False


LLAMA_LINEARS = (
    LlamaLinear("self_attn.q_proj", "heads", 0, queries=True),
    LlamaLinear("self_attn.k_proj", "heads", 0),
    LlamaLinear("self_attn.v_proj", "heads", 0),
    LlamaLinear("self_attn.o_proj", "heads", 1, queries=True),
    LlamaLinear("mlp.gate_proj", "channels", 0),
    LlamaLinear("mlp.up_proj", "channels", 0),
    LlamaLinear("mlp.down_proj", "channels", 1),
)
EQUAL = tuple(name for name in TINY if FAMILIES[name].equal_layers)
CAUSAL = tuple(name for name in TINY if len(FAMILIES[name].layer_lists) == 1)
MIXTURES = tuple(name for name in TINY if FAMILIES[name].has_experts)
# Their first layer is dense, and the second one sparse.
MIXED = ("qwen2_moe", "glm4_moe", "ernie4_5_moe", "deepseek_v3", "deepseek_v2", "glm4_moe_lite")
MIXED += ("dots1", "exaone_moe", "lfm2_moe", "glm_moe_dsa", "mistral4")


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Returns the config of a tiny model of a family, with other fields where `changes` names them."""
    return AutoConfig.for_model(family, **SIZES | TINY[family] | changes)


def layers_with(shape: ModelShape, *counts: tuple[int, int]) -> tuple[LayerCounts, ...]:
    """Returns the layers of a model with these numbers of heads, and of channels or experts, where a layer has any.

    Of query heads so many stay for each key-value head. More layers than counts have them in turn.
    """

    def other(layer: int, kind: str, own: int, heads: int, others: int) -> int:
        if kind in shape.family.fixed or own == 0:
            return own
        return (
            heads * shape.layers[layer].ranges[kind]
            if kind in COARSE
            else others * shape.times(layer, kind)
        )

    assert 0 < len(counts) <= len(shape.counts)
    layers = enumerate(zip(shape.counts, cycle(counts), strict=False))
    return tuple(
        LayerCounts((kind, other(i, kind, own, *x)) for kind, own in layer.items())
        for i, (layer, x) in layers
    )


def is_seq2seq(family: str) -> bool:
    return family not in CAUSAL


def marks(family: str, layer: int = 0, **changes: Any) -> list[TensorSpec]:
    """Returns the tensors that the family of a tiny model marks."""
    config = FAMILIES[family].explicit(tiny_config(family, **changes).to_dict())
    found = FAMILIES[family].layer(config_object(config), layer)
    return [mark for mark in found if isinstance(mark, TensorSpec)]


def changed(family: str, change: Callable[[list[Any]], list[Any]]) -> Family:
    """Returns a family whose marks are changed."""

    class Changed(type(FAMILIES[family])):
        def layer(self, c: Any, i: int) -> Marks:
            return change(list(super().layer(c, i)))

    return Changed()


def kinds(family: str) -> list[str]:
    """Returns the kinds of groups of a family, in the order of the forward."""
    return list(
        dict.fromkeys(run.kind for mark in marks(family) if mark.lora for run in mark.spans)
    )


def norms_are_wide(family: str) -> bool:
    """Returns whether its norms run over all heads, which a cut may take."""
    return FAMILIES[family].wide_norms and "heads" not in FAMILIES[family].fixed


def families(*in_ci: str, of: Iterable[str] = TINY) -> list[Any]:
    """Returns the parameters of a test of families. Those that are not named wait for tests/run_heavy.sh."""
    return [name if name in in_ci else heavy(name) for name in of]


def heavy(*values: Any) -> Any:
    """Returns a case that waits for tests/run_heavy.sh."""
    wait = pytest.mark.skipif(
        "LLAMA_CPP_PYTHON" not in os.environ, reason="takes minutes; see tests/run_heavy.sh"
    )
    return pytest.param(*values, marks=[pytest.mark.heavy, wait])


def heads_divide_hidden(family: str) -> bool:
    """Returns whether the stock config class wants a head count that divides hidden_size."""
    try:
        tiny_config(family, num_attention_heads=8, num_key_value_heads=4)
    except StrictDataclassError:
        return family not in EQUAL
    return False


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    attn_implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Builds a tiny model with random weights, in evaluation mode. All norms and biases differ from their defaults."""
    config = tiny_config(family, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # GPT-OSS draws its sinks
        how: Any = {"attn_implementation": attn_implementation, "experts_implementation": "eager"}
        model = causal_lm_class(family)._from_config(config, **how)
        if not (TINY[family] | changes).get("tie_word_embeddings", True) and is_seq2seq(family):
            model.all_tied_weights_keys.pop("lm_head.weight")
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                if name.endswith("A_log"):
                    # as initialised, sums of decays are so large that they round away what counts
                    parameter.fill_(-3)
                parameter.add_(noise * 0.3)
                if family == "nemotron" and name.endswith("norm.weight"):
                    # the norm adds one, and its weights begin with one all the same
                    parameter.sub_(1)
            elif name.endswith(CORRECTION):  # more would leave experts that no token chooses
                parameter.copy_(noise * 0.03)
            else:
                # in a T5, whose attention would be saturated
                unscaled = name.endswith((".q.weight", ".k.weight"))
                parameter.copy_(noise * (0.5 if "embed" in name else 0.05 if unscaled else 0.25))
        stored = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in stored:  # a router's correction
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.03)
    return model.to(dtype).eval()  # pyright: ignore[reportArgumentType]  # a decorator hides the type of `to`
