"""What rows of the table of families (family.py) share: the linears and companions of attention, MLPs and experts."""

from dataclasses import replace
from typing import Any

from loraprune_ds.model.family_row import Companion, Family, LayerList, Linear, Mixture, Part, Runtime, Width

QUERIES, KEYS, CHANNELS, EXPERTS = Part("heads", "queries"), Part("heads", "head"), Part("channels"), Part("experts")


def rows(name: str, *parts: Part) -> Linear:
    return Linear(name, 0, parts)


def columns(name: str, *parts: Part) -> Linear:
    return Linear(name, 1, parts)


def whole(module: str, *names: str) -> tuple[Linear, ...]:
    return tuple(Linear(f"{module}.{name}", 0) for name in names)


ATTENTION = (
    rows("self_attn.q_proj", QUERIES),
    rows("self_attn.k_proj", KEYS),
    rows("self_attn.v_proj", KEYS),
    columns("self_attn.o_proj", QUERIES),
)
GATED = (rows("mlp.gate_proj", CHANNELS), rows("mlp.up_proj", CHANNELS), columns("mlp.down_proj", CHANNELS))
FUSED_GATED = (rows("mlp.gate_up_proj", CHANNELS, CHANNELS), columns("mlp.down_proj", CHANNELS))
# A norm over the whole projected width. Its weight is sliced, so a cut there is not quite equal to a mask: the mean
# square that divides the remaining elements is of fewer elements.
WIDE_NORMS = (Companion("self_attn.q_norm.weight", (QUERIES,)), Companion("self_attn.k_norm.weight", (KEYS,)))
# Norms of each head with a weight for each.
NORM_OF_EACH_HEAD = (
    Companion("self_attn.q_norm.weight", (Part("heads", "query_count"),), ("head",), optional=True),
    Companion("self_attn.k_norm.weight", (Part("heads"),), ("head",), optional=True),
)

MLP_WIDTH = Runtime("mlp", "intermediate_size", "channels")


def stacks(
    experts: str, gate_up: tuple[str, ...], down: tuple[str, ...], *, transposed: bool = False
) -> tuple[Linear, ...]:
    """Returns the two stacks of gated experts. `gate_up` and `down` are names on disk (`Linear.on_disk`)."""

    def stack(name: str, outputs: Width, inputs: Width, on_disk: tuple[str, ...]) -> Linear:
        along, across = (inputs, outputs) if transposed else (outputs, inputs)
        return Linear(f"{experts}.{name}", 0, (Part("experts", along),), across, on_disk, transposed)

    return stack("gate_up", "gate_up", "hidden", gate_up), stack("down", "hidden", "expert", down)


def each(mlp: str, gate: str, up: str, down: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns these names on disk where each expert has separate linears."""
    gate, up, down = (f"{mlp}.experts.{{}}.{name}.weight" for name in (gate, up, down))
    return (gate, up), (down,)


def router(name: str, on_disk: str | None = None) -> Companion:
    return Companion(f"{name}.weight", (EXPERTS,), ("hidden",), on_disk)


def _listed(dense: list[int], layers: int) -> dict[str, Any]:
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


NO_FURTHER_TOKENS = {"num_nextn_predict_layers": 0}  # those layers are no part of the model


def _first(dense: list[int], layers: int) -> dict[str, Any]:
    assert dense == [*range(len(dense))]
    return {"first_k_dense_replace": len(dense)} | NO_FURTHER_TOKENS


def dense_types(dense: list[int], layers: int) -> dict[str, Any]:
    """Writes the list of transformers 5, and the number that vLLM reads."""
    return {"mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(layers)]} | _first(dense, layers)


LOCAL_EXPERTS = Mixture("num_local_experts", "intermediate_size")
MIXTRAL = Family(
    (*ATTENTION, *stacks("mlp.experts", *each("block_sparse_moe", "w1", "w3", "w2"))),
    (router("mlp.gate", "block_sparse_moe.gate.weight"),),
    mixture=LOCAL_EXPERTS,
)
GRANITE_STACKS = stacks(
    "block_sparse_moe.experts", ("block_sparse_moe.input_linear.weight",), ("block_sparse_moe.output_linear.weight",)
)
GPT_OSS_STACKS = stacks("mlp.experts", ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",), transposed=True)
EXPERT_STACKS = stacks("mlp.experts", *each("mlp", "gate_proj", "up_proj", "down_proj"))
MLP = ("gate_proj", "up_proj", "down_proj")
DENSE_MLP = whole("mlp", *MLP)
SHARED_EXPERT = (*whole("mlp.shared_expert", *MLP), *whole("mlp", "shared_expert_gate"))
QWEN_MOE = Family(
    (*ATTENTION, *EXPERT_STACKS, *DENSE_MLP),
    (router("mlp.gate"),),
    mixture=Mixture("num_experts", "moe_intermediate_size", dense=_listed),
)
ROUTED_EXPERTS = Mixture("n_routed_experts", "moe_intermediate_size", dense=_first, best_of_group=2)
GLM_MOE = Family(
    (*QWEN_MOE.linears, *whole("mlp.shared_experts", *MLP)),
    (router("mlp.gate"), Companion("mlp.gate.e_score_correction_bias", (EXPERTS,), keep_fp32=True)),
    (Runtime("mlp.gate", "num_experts", "experts"),),
    mixture=ROUTED_EXPERTS,
)
# Queries and keys of a head are wider than its values. Latent queries, keys and values belong to no head.
LATENT_ATTENTION = (
    Linear("self_attn.q_proj", 0, (Part("heads", "query"),), optional=True),
    Linear("self_attn.q_b_proj", 0, (Part("heads", "query"),), "query_rank", optional=True),
    Linear("self_attn.kv_b_proj", 0, (Part("heads", "key_and_value"),), "key_value_rank"),
    columns("self_attn.o_proj", Part("heads", "value")),
    *whole("self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
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
GATED_ATTENTION = (rows("self_attn.q_proj", Part("heads", "queries_and_gates")), *ATTENTION[1:])
DELTA_KEYS, DELTA_VALUES, DELTA_EACH = (Part("delta", x) for x in ("delta_key", "delta_values", "delta_count"))
DELTA_QKV = (DELTA_KEYS, DELTA_KEYS, DELTA_VALUES)
DELTA_OUT = columns("linear_attn.out_proj", DELTA_VALUES)
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
        rows("linear_attn.in_proj_qkv", *DELTA_QKV),
        rows("linear_attn.in_proj_z", DELTA_VALUES),
        DELTA_OUT,
        *GATED,
    ),
    (
        *(Companion(f"linear_attn.in_proj_{x}.weight", (DELTA_EACH,), ("hidden",)) for x in "ab"),
        DELTA_CONVOLUTION,
        *DELTA_DECAY,
    ),
    (
        Runtime("linear_attn", "key_dim", "delta", "delta_key"),
        Runtime("linear_attn", "value_dim", "delta", "delta_values"),
    ),
    packs=False,  # positions reset neither the state nor the convolution
    widths=DELTA_WIDTHS,
)


# T5: attention of the decoder to the encoder is a kind of its own, and the MLP of a decoder layer comes after it.
def _t5_attention(name: str, kind: str) -> tuple[Linear, ...]:
    of = Part(kind, "queries")
    return *(rows(f"{name}.{x}", of) for x in "qkv"), columns(f"{name}.o", of)


def _t5_mlp(name: str) -> tuple[Linear, ...]:
    inputs = (Linear(f"{name}.{x}", 0, (CHANNELS,), optional=True) for x in ("wi", "wi_0", "wi_1"))
    return *inputs, Linear(f"{name}.wo", 1, (CHANNELS,), optional=True)


def t5_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Names what the classes have as defaults, and whether the decoder's outputs are scaled before the head."""
    old = config["model_type"] == "t5"
    tied = config.get("tie_word_embeddings") is not False and config["model_type"] != "mt5"
    defaults = {"feed_forward_proj": "relu" if old else "gated-gelu", "scale_decoder_outputs": tied}
    defaults |= {"num_cross_heads": config["num_heads"], "is_encoder_decoder": True}
    decoder = config.get("num_decoder_layers")
    own = {"num_decoder_layers": config["num_layers"] if decoder is None else decoder}
    return defaults | config | own


T5_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
UMT5 = Family(
    (
        *_t5_attention("layer.0.SelfAttention", "heads"),
        *_t5_attention("layer.1.EncDecAttention", "cross_heads"),
        *_t5_mlp("layer.1.DenseReluDense"),
        *_t5_mlp("layer.2.DenseReluDense"),
    ),
    (Companion(T5_BIAS, (Part("heads"),), ("buckets",), axis=1),),
    (
        Runtime("layer.0.SelfAttention", "n_heads", "heads"),
        Runtime("layer.1.EncDecAttention", "n_heads", "cross_heads"),
    ),
    packs=False,
    counts={"heads": "num_heads", "cross_heads": "num_cross_heads", "channels": "d_ff"},
    widths={
        "head": lambda c: c.d_kv,
        "hidden": lambda c: c.d_model,
        "buckets": lambda c: c.relative_attention_num_buckets,
    },
    explicit=t5_fields,
    around=lambda c, layer: ([layer, c.num_layers] if layer < c.num_layers else [0, layer], {}),
    per_layer="layer_sizes",
    as_many={"cross_heads": "heads"},
    layer_lists=(LayerList("encoder.block", "num_layers"), LayerList("decoder.block", "num_decoder_layers")),
    in_memory={"dropout_rate": 0.0},  # else results depend on the number of ranks
)
# Layers of a T5 share the bias of the first. With a copy in each, as a UMT5 has it, any heads may leave.
T5 = replace(UMT5, in_memory={**UMT5.in_memory, "model_type": "umt5"}, shared_bias=T5_BIAS)


def lfm2_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Writes the width of the MLP, which the class has from other fields."""
    width = config.get("block_ff_dim", config.get("intermediate_size", 12288))
    if config.get("block_auto_adjust_ff_dim", True):
        width, factor = int(2 * width / 3), config.get("block_ffn_dim_multiplier", 1.0)
        multiple = config.get("block_multiple_of", 256)
        width = width if factor is None else multiple * -(-int(factor * width) // multiple)
    rest = {key: value for key, value in config.items() if key != "block_ff_dim"}
    return rest | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


def gemma4_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Gives the sizes of full attention the published names, which servers read. transformers saves them otherwise."""
    if not (own := config.get("per_layer_config")):
        return config
    full, rest = next(iter(own.values())), {key: value for key, value in config.items() if key != "per_layer_config"}
    names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
    return rest | {name: full[field] for name, field in names.items() if field in full}


def gemma4_doubled(c: Any) -> range:
    shared = c.num_kv_shared_layers if c.use_double_wide_mlp else 0
    return range(c.num_hidden_layers - shared, c.num_hidden_layers)


def gemma4_around(c: Any, layer: int) -> tuple[list[int], dict[str, Any]]:
    """The last layer has full attention. Layers that share keys and values need one of each type before them."""
    types, last = list(c.layer_types), c.num_hidden_layers - 1
    full, shared = types.index("full_attention"), c.num_kv_shared_layers
    shares = layer > last - shared
    chosen = [*map(types.index, sorted(set(types))), layer, last] if shares else [layer, full]
    return chosen, {"num_kv_shared_layers": 2 * shares}
