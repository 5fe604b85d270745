"""The one table of model families: the parts of a decoder layer that leave with a group, and all peculiarities.

A decoder layer has groups of several kinds. A group leaves as a unit.
  heads     one key-value head with all the query heads that read it. Under MHA it is one head.
  channels  one MLP channel.
  delta     one key head of a gated delta net with its value heads. Layers with these have no attention.
  experts   one expert of a mixture (experts.py).
A dense layer among sparse ones has heads and no experts. Its MLP is whole: it is never cut, and has LoRA all the same.

Along its axis a weight is a sequence of parts. A part has all groups of a layer, one after another. Each group is
`width` rows (or columns) wide. That covers separate weights, fused ones (q|k|v, gate|up), biases and norms. All other
names and shapes come from the model itself, built on the meta device. A size that the table does not explain is
refused.

A family that is like LLaMA is one line: add its `model_type` to LLAMA_LIKE. Another kind of groups is a row of
COUNT_FIELDS, and parts of that kind in a family.
"""

from dataclasses import replace
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.model.family_row import Companion, Family, Linear, Mixture, Part, Runtime, Width

PRUNED = "pruned_"  # prefix of the `model_type` of an export whose layers have different widths

QUERIES, KEYS, CHANNELS, EXPERTS = Part("heads", "queries"), Part("heads", "head"), Part("channels"), Part("experts")


def _rows(name: str, *parts: Part) -> Linear:
    return Linear(name, 0, parts)


def _columns(name: str, *parts: Part) -> Linear:
    return Linear(name, 1, parts)


def _whole(module: str, *names: str) -> tuple[Linear, ...]:
    return tuple(Linear(f"{module}.{name}", 0) for name in names)


ATTENTION = (
    _rows("self_attn.q_proj", QUERIES),
    _rows("self_attn.k_proj", KEYS),
    _rows("self_attn.v_proj", KEYS),
    _columns("self_attn.o_proj", QUERIES),
)
GATED = (_rows("mlp.gate_proj", CHANNELS), _rows("mlp.up_proj", CHANNELS), _columns("mlp.down_proj", CHANNELS))
FUSED_GATED = (_rows("mlp.gate_up_proj", CHANNELS, CHANNELS), _columns("mlp.down_proj", CHANNELS))
# A norm over the whole projected width. Its weight is sliced, so a cut there is not quite equal to a mask: the mean
# square that divides the remaining elements is of fewer elements.
WIDE_NORMS = (
    Companion("self_attn.q_norm.weight", (QUERIES,)),
    Companion("self_attn.k_norm.weight", (KEYS,)),
)
# Norms of each head with a weight for each.
NORM_OF_EACH_HEAD = tuple(
    Companion(f"self_attn.{x}_norm.weight", (Part("heads", n),), ("head",), optional=True)
    for x, n in (("q", "query_count"), ("k", "one"))
)

MLP_WIDTH = Runtime("mlp", "intermediate_size", "channels")


def _stacks(
    experts: str, gate_up: tuple[str, ...], down: tuple[str, ...], *, transposed: bool = False
) -> tuple[Linear, ...]:
    """Returns the two stacks of gated experts. `gate_up` and `down` are names on disk (`Linear.on_disk`)."""

    def stack(name: str, outputs: Width, inputs: Width, on_disk: tuple[str, ...]) -> Linear:
        rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
        return Linear(f"{experts}.{name}", 0, (Part("experts", rows),), columns, on_disk, transposed)

    return stack("gate_up", "gate_up", "hidden", gate_up), stack("down", "hidden", "expert", down)


def _each(mlp: str, gate: str, up: str, down: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns these names on disk where each expert has separate linears."""
    gate, up, down = (f"{mlp}.experts.{{}}.{name}.weight" for name in (gate, up, down))
    return (gate, up), (down,)


def _router(name: str, on_disk: str | None = None) -> Companion:
    return Companion(f"{name}.weight", (EXPERTS,), ("hidden",), on_disk)


def _listed(dense: list[int], layers: int) -> dict[str, Any]:
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


NO_FURTHER_TOKENS = {"num_nextn_predict_layers": 0}  # those layers are no part of the model


def _first(dense: list[int], layers: int) -> dict[str, Any]:
    assert dense == [*range(len(dense))]
    return {"first_k_dense_replace": len(dense)} | NO_FURTHER_TOKENS


def _types(dense: list[int], layers: int) -> dict[str, Any]:
    return {"mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(layers)]} | NO_FURTHER_TOKENS


LOCAL_EXPERTS = Mixture("num_local_experts", "intermediate_size")
MIXTRAL = Family(
    (*ATTENTION, *_stacks("mlp.experts", *_each("block_sparse_moe", "w1", "w3", "w2"))),
    (_router("mlp.gate", "block_sparse_moe.gate.weight"),),
    mixture=LOCAL_EXPERTS,
)
GRANITE_STACKS = _stacks(
    "block_sparse_moe.experts", ("block_sparse_moe.input_linear.weight",), ("block_sparse_moe.output_linear.weight",)
)
GPT_OSS_STACKS = _stacks("mlp.experts", ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",), transposed=True)
EXPERT_STACKS = _stacks("mlp.experts", *_each("mlp", "gate_proj", "up_proj", "down_proj"))
MLP = ("gate_proj", "up_proj", "down_proj")
DENSE_MLP = _whole("mlp", *MLP)
SHARED_EXPERT = (*_whole("mlp.shared_expert", *MLP), *_whole("mlp", "shared_expert_gate"))
QWEN_MOE = Family(
    (*ATTENTION, *EXPERT_STACKS, *DENSE_MLP),
    (_router("mlp.gate"),),
    mixture=Mixture("num_experts", "moe_intermediate_size", dense=_listed),
)
ROUTED_EXPERTS = Mixture("n_routed_experts", "moe_intermediate_size", dense=_first, best_of_group=2)
GLM_MOE = Family(
    (*QWEN_MOE.linears, *_whole("mlp.shared_experts", *MLP)),
    (_router("mlp.gate"), Companion("mlp.gate.e_score_correction_bias", (EXPERTS,), keep_fp32=True)),
    (Runtime("mlp.gate", "num_experts", "experts"),),
    mixture=ROUTED_EXPERTS,
)
# Queries and keys of a head are wider than its values. Latent queries, keys and values belong to no head.
LATENT_ATTENTION = (
    Linear("self_attn.q_proj", 0, (Part("heads", "query"),), optional=True),
    Linear("self_attn.q_b_proj", 0, (Part("heads", "query"),), "query_rank", optional=True),
    Linear("self_attn.kv_b_proj", 0, (Part("heads", "key_and_value"),), "key_value_rank"),
    _columns("self_attn.o_proj", Part("heads", "value")),
    *_whole("self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
)
LATENT_MOE = replace(
    GLM_MOE,
    linears=(*LATENT_ATTENTION, *GLM_MOE.linears[len(ATTENTION) :]),
    widths={
        "head": lambda c: c.qk_rope_head_dim,
        "query_rank": lambda c: c.q_lora_rank or 0,
        "key_value_rank": lambda c: c.kv_lora_rank,
        "query": lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim,
        "key_and_value": lambda c: c.qk_nope_head_dim + c.v_head_dim,
        "value": lambda c: c.v_head_dim,
    },
)
# The query of each head, then the gate of its output. A group's rows are contiguous all the same.
GATED_ATTENTION = (_rows("self_attn.q_proj", Part("heads", "queries_and_gates")), *ATTENTION[1:])
DELTA_KEYS, DELTA_VALUES, DELTA_EACH = (Part("delta", x) for x in ("delta_key", "delta_values", "delta_count"))
DELTA_QKV = (DELTA_KEYS, DELTA_KEYS, DELTA_VALUES)
DELTA_OUT = _columns("linear_attn.out_proj", DELTA_VALUES)
DELTA_CONVOLUTION = Companion("linear_attn.conv1d.weight", DELTA_QKV, ("one", "kernel"))
# transformers loads these in the model's dtype, vLLM A_log in fp32. Some checkpoints have them in fp32.
DELTA_DECAY = tuple(Companion(f"linear_attn.{x}", (DELTA_EACH,), keep_fp32=True) for x in ("dt_bias", "A_log"))


def _count(c: Any) -> int:
    return c.linear_num_value_heads // c.linear_num_key_heads


DELTA_WIDTHS: dict[Width, Any] = {
    "queries_and_gates": lambda c: 2 * c.head_dim * (c.num_attention_heads // c.num_key_value_heads),
    "delta_key": lambda c: c.linear_key_head_dim,
    "delta_values": lambda c: c.linear_value_head_dim * _count(c),
    "delta_count": _count,
    "delta_all": lambda c: 2 * (c.linear_key_head_dim + c.linear_value_head_dim * _count(c)),
    "delta_numbers": lambda c: 2 * _count(c),
    "kernel": lambda c: c.linear_conv_kernel_dim,
}
QWEN3_5 = Family(
    (
        *GATED_ATTENTION,
        _rows("linear_attn.in_proj_qkv", *DELTA_QKV),
        _rows("linear_attn.in_proj_z", DELTA_VALUES),
        *(DELTA_OUT, *GATED),
    ),
    (
        *(Companion(f"linear_attn.in_proj_{x}.weight", (DELTA_EACH,), ("hidden",)) for x in "ab"),
        *(DELTA_CONVOLUTION, *DELTA_DECAY),
    ),
    (
        Runtime("linear_attn", "key_dim", "delta", "delta_key"),
        Runtime("linear_attn", "value_dim", "delta", "delta_values"),
    ),
    packs=False,  # positions reset neither the state nor the convolution
    widths=DELTA_WIDTHS,
)
LLAMA_LINEARS = ATTENTION + GATED
LLAMA = Family(LLAMA_LINEARS, runtime=(MLP_WIDTH,))
GEMMA = replace(LLAMA, windows_begin_with_bos=True)
CAPPED_GEMMA = replace(GEMMA, softcap="final_logit_softcapping", eager_only="a cap on scores (attn_logit_softcapping)")
UNGATED = Family((*ATTENTION, _rows("mlp.up_proj", CHANNELS), _columns("mlp.down_proj", CHANNELS)))


def _lfm2_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Writes the width of the MLP, which the class has from other fields."""
    width = config.get("block_ff_dim", config.get("intermediate_size", 12288))
    if config.get("block_auto_adjust_ff_dim", True):
        width, factor = int(2 * width / 3), config.get("block_ffn_dim_multiplier", 1.0)
        multiple = config.get("block_multiple_of", 256)
        width = width if factor is None else multiple * -(-int(factor * width) // multiple)
    rest = {key: value for key, value in config.items() if key != "block_ff_dim"}
    return rest | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


def _gemma4_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Gives the sizes of full attention the published names, which servers read. transformers saves them otherwise."""
    if not (own := config.get("per_layer_config")):
        return config
    full, rest = next(iter(own.values())), {key: value for key, value in config.items() if key != "per_layer_config"}
    names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
    return rest | {name: full[field] for name, field in names.items() if field in full}


def _gemma4_doubled(c: Any) -> range:
    shared = c.num_kv_shared_layers if c.use_double_wide_mlp else 0
    return range(c.num_hidden_layers - shared, c.num_hidden_layers)


def _gemma4_around(c: Any, layer: int) -> tuple[list[int], dict[str, Any]]:
    """The last layer has full attention. Layers that share keys and values need one of each type before them."""
    types, last = list(c.layer_types), c.num_hidden_layers - 1
    full, shared = types.index("full_attention"), c.num_kv_shared_layers
    shares = layer > last - shared
    chosen = [*map(types.index, sorted(set(types))), layer, last] if shares else [layer, full]
    return chosen, {"num_kv_shared_layers": 2 * shares}


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
        (_rows("self_attn.qkv_proj", QUERIES, KEYS, KEYS), _columns("self_attn.o_proj", QUERIES), *FUSED_GATED),
        runtime=(
            Runtime("self_attn", "num_key_value_heads", "heads"),
            Runtime("self_attn.config", "num_attention_heads", "heads", "query_count"),
        ),
    ),
    **dict.fromkeys(("glm", "glm4"), Family(ATTENTION + FUSED_GATED)),
    "starcoder2": Family((*ATTENTION, _rows("mlp.c_fc", CHANNELS), _columns("mlp.c_proj", CHANNELS))),
    **dict.fromkeys(("nemotron", "arcee", "apertus", "jais2"), UNGATED),
    "mixtral": MIXTRAL,
    "minimax_m2": replace(
        MIXTRAL,
        companions=(
            *MIXTRAL.companions,
            Companion(
                *("mlp.e_score_correction_bias", (EXPERTS,), ()),
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
    "glm4_moe_lite": replace(LATENT_MOE, mixture=replace(ROUTED_EXPERTS, dense=_types)),
    "qwen3_5_text": replace(QWEN3_5, runtime=(MLP_WIDTH, *QWEN3_5.runtime)),
    "qwen3_5_moe_text": replace(
        QWEN3_5,
        linears=(*QWEN3_5.linears[: -len(GATED)], *EXPERT_STACKS, *SHARED_EXPERT),
        companions=(*QWEN3_5.companions, _router("mlp.gate")),
        mixture=Mixture("num_experts", "moe_intermediate_size"),
    ),
    # It has all of a key head together.
    "qwen3_next": Family(
        (
            *(*GATED_ATTENTION, _rows("linear_attn.in_proj_qkvz", Part("delta", "delta_all")), DELTA_OUT),
            *(*EXPERT_STACKS, *DENSE_MLP, *SHARED_EXPERT),
        ),
        (
            Companion("linear_attn.in_proj_ba.weight", (Part("delta", "delta_numbers"),), ("hidden",)),
            *(DELTA_CONVOLUTION, *DELTA_DECAY, _router("mlp.gate")),
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
            *(*ATTENTION[:3], _columns("self_attn.out_proj", QUERIES), *_whole("conv", "in_proj", "out_proj")),
            *(_rows(f"feed_forward.{name}", CHANNELS) for name in ("w1", "w3")),
            _columns("feed_forward.w2", CHANNELS),
        ),
        packs=False,
        explicit=_lfm2_fields,
    ),
    # The inner width of its Mamba is a multiple of hidden_size.
    "granitemoehybrid": Family(
        (
            *(*ATTENTION, *_whole("mamba", "in_proj")),
            _rows("shared_mlp.input_linear", CHANNELS, CHANNELS),
            _columns("shared_mlp.output_linear", CHANNELS),
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
            *_whole("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *GATED,
            *_stacks("experts", ("experts.gate_up_proj",), ("experts.down_proj",)),
            *(Linear(f"per_layer_{name}", 0) for name in ("input_gate", "projection")),
        ),
        companions=(_router("router.proj"), Companion("router.per_expert_scale", (EXPERTS,))),
        runtime=(),
        softcap="final_logit_softcapping",
        mixture=Mixture("num_experts", "moe_intermediate_size", chosen="top_k_experts", optional=True),
        explicit=_gemma4_fields,
        doubled=_gemma4_doubled,
        around=_gemma4_around,
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
    "granitemoe": Family(
        (*ATTENTION, *GRANITE_STACKS),
        (_router("block_sparse_moe.router", "block_sparse_moe.router.layer.weight"),),
        logit_divisor="logits_scaling",
        mixture=LOCAL_EXPERTS,
    ),
    "gpt_oss": Family(
        (*ATTENTION, *GPT_OSS_STACKS),
        (
            Companion("self_attn.sinks", (Part("heads", "query_count"),)),
            _router("mlp.router"),
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
    "llama4": "its experts weigh their inputs, and run on every token",
    "phi": "its head has a bias, which no loss here adds",
    "kimi_k2": "transformers has no class for it",
    "kimi_linear": "its linear attention has a decay for each channel of a head, which the table has no groups for",
    "nemotron_h": "PEFT refuses LoRA on its out_proj, and its files name layers otherwise than its class",
    "phimoe": "its router draws experts at random while it trains",
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
