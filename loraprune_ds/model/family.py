"""The one table of model families: the parts of a decoder layer that leave with a group, and all peculiarities.

A decoder layer has groups of several kinds. A group leaves as a unit.
  heads     one key-value head with all the query heads that read it. Under MHA it is one head.
  channels  one MLP channel.
  delta     one key head of a gated delta net with its value heads. Layers with these have no attention.
  experts   one expert of a mixture (experts.py).
  cross_heads  one head of a decoder's attention to its encoder. Layers of the encoder have none.
A dense layer among sparse ones has heads and no experts. Its MLP is whole: it is never cut, and has LoRA all the same.

Along its axis a weight is a sequence of parts. A part has all groups of a layer, one after another. Each group is
`width` rows (or columns) wide. That covers separate weights, fused ones (q|k|v, gate|up), biases and norms. All other
names and shapes come from the model itself, built on the meta device. A size that the table does not explain is
refused.

A family that is like LLaMA is one line: add its `model_type` to LLAMA_LIKE. Another kind of groups is a row of
COUNT_FIELDS, and parts of that kind in a family.
"""

from dataclasses import replace

from loraprune_ds.errors import UserError
from loraprune_ds.model.family_parts import (
    ATTENTION,
    CHANNELS,
    DELTA_CONVOLUTION,
    DELTA_DECAY,
    DELTA_OUT,
    DELTA_WIDTHS,
    DENSE_MLP,
    EXPERT_STACKS,
    EXPERTS,
    FUSED_GATED,
    GATED,
    GATED_ATTENTION,
    GLM_MOE,
    GPT_OSS_STACKS,
    GRANITE_STACKS,
    KEYS,
    LATENT_MOE,
    LOCAL_EXPERTS,
    MIXTRAL,
    MLP_WIDTH,
    NORM_OF_EACH_HEAD,
    QUERIES,
    QWEN3_5,
    QWEN_MOE,
    ROUTED_EXPERTS,
    SHARED_EXPERT,
    T5,
    UMT5,
    WIDE_NORMS,
    columns,
    dense_types,
    gemma4_around,
    gemma4_doubled,
    gemma4_fields,
    lfm2_fields,
    router,
    rows,
    stacks,
    whole,
)
from loraprune_ds.model.family_row import Companion, Family, Linear, Mixture, Part, Runtime

PRUNED = "pruned_"  # prefix of the `model_type` of an export whose layers have different widths

LLAMA_LINEARS = ATTENTION + GATED
LLAMA = Family(LLAMA_LINEARS, runtime=(MLP_WIDTH,))
GEMMA = replace(LLAMA, windows_begin_with_bos=True)
CAPPED_GEMMA = replace(GEMMA, softcap="final_logit_softcapping", eager_only="a cap on scores (attn_logit_softcapping)")
UNGATED = Family((*ATTENTION, rows("mlp.up_proj", CHANNELS), columns("mlp.down_proj", CHANNELS)))
LLAMA_LIKE = "llama mistral ministral ministral3 qwen3 smollm3 seed_oss olmo exaone4 ernie4_5 hunyuan_v1_dense"
LLAMA_LIKE += " cwm internlm3 iquestcoder"
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(LLAMA_LIKE.split(), LLAMA),
    "qwen2": replace(LLAMA, vllm="transformers"),  # vLLM's own class takes hidden_size // query heads for head_dim
    "gemma": GEMMA,
    **dict.fromkeys(("gemma2", "vaultgemma"), CAPPED_GEMMA),
    "gemma3_text": replace(GEMMA, softcap="final_logit_softcapping"),
    "granite": replace(LLAMA, logit_divisor="logits_scaling"),
    "hyperclovax": replace(LLAMA, logit_scale="logits_scaling"),
    "cohere": replace(LLAMA, logit_scale="logit_scale", companions=NORM_OF_EACH_HEAD),
    "cohere2": replace(LLAMA, logit_scale="logit_scale", vllm="transformers"),  # its own class gives other logits
    **dict.fromkeys(("olmo2", "olmo3"), replace(LLAMA, companions=WIDE_NORMS)),
    "phi3": Family(
        (rows("self_attn.qkv_proj", QUERIES, KEYS, KEYS), columns("self_attn.o_proj", QUERIES), *FUSED_GATED),
        runtime=(
            Runtime("self_attn", "num_key_value_heads", "heads"),
            Runtime("self_attn.config", "num_attention_heads", "heads", "query_count"),
        ),
    ),
    **dict.fromkeys(("glm", "glm4"), Family(ATTENTION + FUSED_GATED)),
    "starcoder2": Family((*ATTENTION, rows("mlp.c_fc", CHANNELS), columns("mlp.c_proj", CHANNELS))),
    **dict.fromkeys(("nemotron", "arcee", "apertus", "jais2"), UNGATED),
    "mixtral": MIXTRAL,
    "minimax_m2": replace(
        MIXTRAL,
        companions=(
            *MIXTRAL.companions,
            Companion(
                "mlp.e_score_correction_bias",
                (EXPERTS,),
                (),
                on_disk="block_sparse_moe.e_score_correction_bias",
                keep_fp32=True,
            ),
            *WIDE_NORMS,
        ),
    ),
    "qwen3_moe": QWEN_MOE,
    "qwen2_moe": replace(QWEN_MOE, linears=(*QWEN_MOE.linears, *SHARED_EXPERT)),
    "glm4_moe": GLM_MOE,
    "deepseek_v3": LATENT_MOE,
    # Its router has no correction.
    "deepseek_v2": replace(
        LATENT_MOE, companions=GLM_MOE.companions[:1], mixture=replace(ROUTED_EXPERTS, best_of_group=1)
    ),
    "glm4_moe_lite": replace(LATENT_MOE, mixture=replace(ROUTED_EXPERTS, dense=dense_types)),
    "qwen3_5_text": replace(QWEN3_5, runtime=(MLP_WIDTH, *QWEN3_5.runtime)),
    "qwen3_5_moe_text": replace(
        QWEN3_5,
        linears=(*QWEN3_5.linears[: -len(GATED)], *EXPERT_STACKS, *SHARED_EXPERT),
        companions=(*QWEN3_5.companions, router("mlp.gate")),
        mixture=Mixture("num_experts", "moe_intermediate_size"),
    ),
    # It has all of a key head together.
    "qwen3_next": Family(
        (
            *GATED_ATTENTION,
            rows("linear_attn.in_proj_qkvz", Part("delta", "delta_all")),
            DELTA_OUT,
            *EXPERT_STACKS,
            *DENSE_MLP,
            *SHARED_EXPERT,
        ),
        (
            Companion("linear_attn.in_proj_ba.weight", (Part("delta", "delta_numbers"),), ("hidden",)),
            DELTA_CONVOLUTION,
            *DELTA_DECAY,
            router("mlp.gate"),
        ),
        (
            *QWEN3_5.runtime,
            Runtime("linear_attn", "num_k_heads", "delta"),
            Runtime("linear_attn", "num_v_heads", "delta", "delta_count"),
        ),
        packs=False,
        mixture=QWEN_MOE.mixture,
        widths=DELTA_WIDTHS,
    ),
    # Its short convolutions are as wide as the residual stream.
    "lfm2": Family(
        (
            *ATTENTION[:3],
            columns("self_attn.out_proj", QUERIES),
            *whole("conv", "in_proj", "out_proj"),
            *(rows(f"feed_forward.{name}", CHANNELS) for name in ("w1", "w3")),
            columns("feed_forward.w2", CHANNELS),
        ),
        packs=False,
        explicit=lfm2_fields,
    ),
    # The inner width of its Mamba is a multiple of hidden_size.
    "granitemoehybrid": Family(
        (
            *ATTENTION,
            *whole("mamba", "in_proj"),
            rows("shared_mlp.input_linear", CHANNELS, CHANNELS),
            columns("shared_mlp.output_linear", CHANNELS),
        ),
        logit_divisor="logits_scaling",
        packs=False,
        without_lora=("mamba.out_proj",),
        counts={"channels": "shared_intermediate_size"},
    ),
    # Sliding and full attention differ in the width and number of heads, and share the count of queries. So heads stay.
    "gemma4_text": replace(
        GEMMA,
        linears=(
            *whole("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *GATED,
            *stacks("experts", ("experts.gate_up_proj",), ("experts.down_proj",)),
            *(Linear(f"per_layer_{name}", 0) for name in ("input_gate", "projection")),
        ),
        companions=(router("router.proj"), Companion("router.per_expert_scale", (EXPERTS,))),
        runtime=(),
        softcap="final_logit_softcapping",
        mixture=Mixture("num_experts", "moe_intermediate_size", chosen="top_k_experts", optional=True),
        explicit=gemma4_fields,
        doubled=gemma4_doubled,
        around=gemma4_around,
        equal_layers=True,
    ),
    # Its class has hidden_size inputs in o_proj.
    "helium": replace(LLAMA, fixed=("heads",)),
    # Its class computes the width of the norms from hidden_size.
    "olmoe": replace(
        QWEN_MOE,
        linears=(*ATTENTION, *EXPERT_STACKS),
        companions=(*QWEN_MOE.companions, *WIDE_NORMS),
        mixture=Mixture("num_experts", "intermediate_size"),
        fixed=("heads",),
    ),
    **dict.fromkeys(("t5", "mt5"), T5),
    "umt5": UMT5,
    "granitemoe": Family(
        (*ATTENTION, *GRANITE_STACKS),
        (router("block_sparse_moe.router", "block_sparse_moe.router.layer.weight"),),
        logit_divisor="logits_scaling",
        mixture=LOCAL_EXPERTS,
    ),
    "gpt_oss": Family(
        (*ATTENTION, *GPT_OSS_STACKS),
        (
            Companion("self_attn.sinks", (Part("heads", "query_count"),)),
            router("mlp.router"),
            Companion("mlp.router.bias", (EXPERTS,)),
            Companion("mlp.experts.gate_up_proj_bias", (EXPERTS,), ("gate_up",)),
            Companion("mlp.experts.down_proj_bias", (EXPERTS,), ("hidden",)),
        ),
        eager_only="attention sinks",
        packs=False,
        mixture=LOCAL_EXPERTS,
    ),
}

# Types that are asked for and have no row, and why.
WITHOUT_ROW = {
    "llama4": "its experts scale their inputs, and run on every token",
    "phi": "its head has a bias, which no loss here adds",
    "kimi_k2": "transformers has no class for it",
    "kimi_linear": "its linear attention has a decay per channel of a head, for which the table has no groups",
    "nemotron_h": "PEFT refuses LoRA on its out_proj, and its files name layers differently from its class",
    "t5gemma": "encoder and decoder have sizes of their own, and a stock class has one number for all their heads",
    "bart": "its class takes hidden_size / heads as the width of a head",
    "phimoe": "its router draws experts at random in training",
}


def family_name(model_type: str) -> str:
    return model_type.removeprefix(PRUNED)


def find_family(model_type: object, where: str, others: str = "") -> Family:
    """Returns the family of a model.

    Args:
        others: the refusal names this after the families.

    Raises:
        UserError: no family of the table has this model type. The line names `where`, the folder, hub id or model.
    """
    if isinstance(model_type, str) and family_name(model_type) in FAMILIES:
        return FAMILIES[family_name(model_type)]
    reason = WITHOUT_ROW.get(str(model_type).removesuffix("_text"))
    supported = ", ".join(sorted(FAMILIES)) + others
    refusal = f"{where}: model_type {model_type!r} is not supported{f', because {reason}' if reason else ''}"
    raise UserError(f"{refusal}; supported: {supported}")
