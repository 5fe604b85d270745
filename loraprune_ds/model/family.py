"""The families by `model_type`: the names that share one, and the types that have none, with the reason.

A family whose layers have LLaMA's tensors is one word: add its `model_type` to LLAMA_LIKE. `replace(LLAMA, ...)` sets
the fields of `Family` that differ, such as heads that stay because the class ties their number to hidden_size. Any
other family needs a class, whose `layer` marks the tensors that leave (families/base.py).
"""

from dataclasses import replace
from typing import Any

from transformers import __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loraprune_ds.errors import UserError, require
from loraprune_ds.model.families import hybrid, llama, moe, muse_glimmer, t5
from loraprune_ds.model.families.base import PRUNED, Family

LLAMA = llama.Llama()
LLAMA_LIKE = "llama mistral ministral ministral3 qwen3 smollm3 seed_oss olmo exaone4 ernie4_5 hunyuan_v1_dense"
LLAMA_LIKE += " cwm internlm3 iquestcoder glm glm4 starcoder2 nemotron arcee apertus jais2"
GEMMA = replace(LLAMA, windows_begin_with_bos=True)
CAPPED_GEMMA = replace(
    GEMMA, softcap="final_logit_softcapping", eager_only="a cap on scores (attn_logit_softcapping)"
)
LOCAL: dict[str, Any] = {"count": "num_local_experts", "size": "intermediate_size"}
LISTED: dict[str, Any] = {"dense_fields": ("mlp_only_layers", "decoder_sparse_step")}
ROUTED: dict[str, Any] = {
    "count": "n_routed_experts",
    "dense_fields": ("first_k_dense_replace", moe.NEXT),
}
INTERVAL = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", moe.NEXT)
# transformers 5 reads the list, vLLM the number.
TYPES: dict[str, Any] = {"dense_fields": ("mlp_layer_types", *ROUTED["dense_fields"])}
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(LLAMA_LIKE.split(), LLAMA),
    # vLLM's own class takes hidden_size // query heads for head_dim
    "qwen2": replace(LLAMA, vllm="transformers"),
    "gemma": GEMMA,
    **dict.fromkeys(("gemma2", "vaultgemma"), CAPPED_GEMMA),
    "gemma3_text": replace(GEMMA, softcap="final_logit_softcapping"),
    "gemma4_text": hybrid.Gemma4(
        softcap="final_logit_softcapping",
        windows_begin_with_bos=True,
        chosen="top_k_experts",
        equal_layers=True,
    ),
    "granite": replace(LLAMA, logit_divisor="logits_scaling"),
    "granitemoe": moe.GraniteMoe(logit_divisor="logits_scaling", **LOCAL),
    "granitemoehybrid": llama.GraniteHybrid(logit_divisor="logits_scaling", packs=False),
    "hyperclovax": replace(LLAMA, logit_scale="logits_scaling"),
    "cohere": llama.Cohere(logit_scale="logit_scale"),
    # its own class gives other logits
    "cohere2": replace(LLAMA, logit_scale="logit_scale", vllm="transformers"),
    **dict.fromkeys(("olmo2", "olmo3"), replace(LLAMA, wide_norms=True)),
    # Their classes have hidden_size inputs in o_proj.
    **dict.fromkeys(("helium", "stablelm"), replace(LLAMA, fixed=("heads",))),
    "muse_glimmer_text": muse_glimmer.MuseGlimmer(
        logit_scale="output_multiplier", softcap="final_logit_softcapping", equal_layers=True
    ),
    "phi3": llama.Phi3(),
    "lfm2": llama.Lfm2(packs=False),
    "lfm3": llama.Lfm3(packs=False),
    "mixtral": moe.Mixtral(**LOCAL),
    "minimax_m2": moe.Mixtral(
        correction_in_files="block_sparse_moe.e_score_correction_bias", wide_norms=True, **LOCAL
    ),
    **dict.fromkeys(("qwen3_moe", "qwen2_moe"), moe.Moe(**LISTED)),
    # Its class has hidden_size weights in the norms.
    "olmoe": moe.Moe(size="intermediate_size", fixed=("heads",), wide_norms=True),
    "gpt_oss": moe.GptOss(eager_only="attention sinks", packs=False, **LOCAL),
    **dict.fromkeys(("glm4_moe", "dots1"), moe.Moe(best_of_group=2, **ROUTED)),
    "exaone_moe": moe.Moe(
        best_of_group=2, correction_in_files="mlp.e_score_correction_bias", **TYPES
    ),
    "hunyuan_v1_moe": moe.HunyuanMoe(size="intermediate_size", chosen="moe_topk"),
    "lfm2_moe": moe.Lfm2Moe(dense_fields=("num_dense_layers",), packs=False),
    "ernie4_5_moe": moe.ErnieMoe(count="moe_num_experts", chosen="moe_k", dense_fields=INTERVAL),
    "deepseek_v3": moe.Latent(best_of_group=2, **ROUTED),
    "mistral4": moe.Mistral4(best_of_group=2, equal_layers=True, **ROUTED),
    "deepseek_v2": moe.Latent(best_of_group=1, **ROUTED),
    "glm4_moe_lite": moe.Latent(best_of_group=2, **ROUTED | TYPES),
    "glm_moe_dsa": moe.SparseAttention(best_of_group=2, **ROUTED | TYPES),
    "nemotron_h": hybrid.NemotronH(
        count="n_routed_experts", best_of_group=2, dense_fields=(moe.NEXT,), packs=False
    ),
    # Positions do not reset the states of delta nets or their convolutions.
    "qwen3_5_text": hybrid.Qwen35(packs=False),
    "qwen3_5_moe_text": hybrid.DeltaMoe(packs=False),
    "qwen3_next": hybrid.DeltaMoe(packs=False, **LISTED),
    **dict.fromkeys(("t5", "mt5"), t5.T5(packs=False)),
    "umt5": t5.Umt5(packs=False),
}

# Types that users may expect but that are not supported, and why.
REFUSED = {
    "llama4": "its experts scale their inputs, and run on every token",
    "phi": "its head has a bias, which no loss here adds",
    "kimi_k2": "transformers has no class for it",
    "kimi_linear": "its linear attention has a decay per channel of a head, which no kind of groups covers",
    "t5gemma": "encoder and decoder have sizes of their own, and a stock class has one number for all their heads",
    "bart": "its class takes hidden_size / heads as the width of a head",
    "phimoe": "its router draws experts at random in training",
    "laguna": "its layers have different numbers of query heads for each key-value head",
    "falcon_h1": "its class has scales in a buffer of the model's dtype, which runs keep in fp32",
    "deepseek_v4": "its first layers look up the experts of a token in a table",
    **dict.fromkeys(
        ("minimax_m3_vl", "olmo_hybrid"),
        "its class joins tensors that are separate in weight files",
    ),
    "gemma3n": "its layers have several streams of hidden states, and share keys and values",
}


def family_name(model_type: str) -> str:
    return model_type.removeprefix(PRUNED)


def find_family(model_type: object, where: str, others: str = "") -> Family:
    """Returns the family of a model.

    Args:
        others: further supported models, named after the families in the refusal.

    Raises:
        UserError: no family has this model type, or the installed transformers lacks it. The line names `where`, the
            folder, hub id or model.
    """
    name = family_name(str(model_type))
    if name in FAMILIES:
        require(
            name in CONFIG_MAPPING,
            f"{where}: transformers {__version__} has no model_type {name!r}; install a newer one",
        )
        return FAMILIES[name]
    reason = REFUSED.get(name.removesuffix("_text"))
    because = f", because {reason}" if reason else ""
    supported = ", ".join(sorted(FAMILIES)) + others
    raise UserError(
        f"{where}: model_type {model_type!r} is not supported{because}; supported: {supported}"
    )
