"""The architectures of llama.cpp for our families, and their differences from transformers.

`bash tests/run_heavy.sh --llama-cpp` compares each with transformers. llama.cpp's qwen2, phi3, starcoder2, cohere2 and
olmo2 take hidden_size for the width of all query heads, so they cannot hold a model that lost heads. A Qwen2 or Phi-3
is written as an equivalent LLaMA.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loraprune_ds.errors import UserError
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import config_object
from loraprune_ds.model.family import family_name
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.text_part import text_config

Precision = Literal["f16", "q8_0"]
QKV = frozenset(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
QUERIES = ("self_attn.q_proj",)
ROTARY = ("self_attn.q_proj", "self_attn.k_proj")
LINEARS = QKV | {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
SIGMOID = "SIGMOID"
SOFTMAX = "SOFTMAX"
# A fused linear -> its parts, which are separate in llama.cpp.
PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
}
# fields that name the activation
ACTIVATIONS = ("hidden_activation", "hidden_act")
# A config field, unless null -> the method of GGUFWriter for it. An architecture of llama.cpp ignores what it lacks.
NUMBERS = {
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "norm_eps": "add_layer_norm_rms_eps",
    "layer_norm_epsilon": "add_layer_norm_rms_eps",
    "layer_norm_eps": "add_layer_norm_eps",
    "use_parallel_residual": "add_parallel_residual",
    "attention_multiplier": "add_attention_scale",
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "logits_scaling": "add_logit_scale",
    "logit_scale": "add_logit_scale",
    "final_logit_softcapping": "add_final_logit_softcapping",
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "n_shared_experts": "add_expert_shared_count",
    "num_shared_experts": "add_expert_shared_count",
    "moe_num_shared_experts": "add_expert_shared_count",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "routed_scaling_factor": "add_expert_weights_scale",
    "norm_topk_prob": "add_expert_weights_norm",
    "moe_layer_interval": "add_interleave_moe_layer_step",
    "q_lora_rank": "add_q_lora_rank",
    "kv_lora_rank": "add_kv_lora_rank",
    "linear_conv_kernel_dim": "add_ssm_conv_kernel",
    "linear_key_head_dim": "add_ssm_state_size",
    "linear_num_key_heads": "add_ssm_group_count",
    "linear_num_value_heads": "add_ssm_time_step_rank",
    "conv_L_cache": "add_shortconv_l_cache",
}
GROUPS = {"n_group": "add_expert_group_count", "topk_group": "add_expert_group_used_count"}


class NotInGguf(UserError):
    """Raised for a model that llama.cpp cannot hold or compute."""

    def __init__(self, where: object, reason: str) -> None:
        super().__init__(f"{where}: {reason}; possible formats: hf, adapter")


@dataclass(frozen=True)
class Architecture:
    """Describes how llama.cpp holds a family, by names alone: a model card is written without gguf-py, too."""

    uniform: str | None = None  # for layers of one size. None: the family's name
    unequal: str | None = None  # for layers that differ
    # the two rows of a rotary pair are adjacent; transformers has them half a head apart
    neighbours: bool = False
    activations: tuple[str, ...] = ("silu",)  # the ones that llama.cpp computes
    biases: frozenset[str] = frozenset()  # linears with a bias in llama.cpp
    ropes: tuple[str, ...] = ("default",)  # the supported kinds of rotary scaling
    norm_offset: float = 0.0  # transformers adds it to the weight of each norm
    # every n-th layer attends to all tokens, the others within a sliding window. 0: no window
    window_period: int = 0
    rope_period: int = 0  # every n-th layer has no rotary embedding. 0: all have one
    # linears that must be hidden_size x hidden_size, so no heads may leave
    square: tuple[str, ...] = ()
    # config field -> its one supported value
    only: Mapping[str, Any] = field(default_factory=dict[str, Any])
    in_turn: bool = False  # an expert's gate and up outputs alternate in transformers
    scaled: str | None = None  # the tensor to multiply by the ratio of the two attention scales
    # with this many layers, scores are divided by sqrt(hidden_size // query heads), not head_dim
    odd_depth: int = 0
    partial: bool = False  # partial rotary embeddings are supported
    # converts router scores to weights, if the file must name it
    gating: str | None = None
    grouped: bool = False  # the router first chooses among groups of experts
    delta: bool = False  # gated delta nets, with keys as wide as values
    # models with these numbers of layers have no latent queries, all others must have them
    lite: tuple[int, ...] = ()
    short: bool = False  # a layer without key-value heads is a short convolution


LLAMA_ARCH = Architecture(
    "llama", "deci", neighbours=True, biases=LINEARS, ropes=("default", "linear", "llama3")
)
DELTA = Architecture("qwen35", norm_offset=1.0, partial=True, delta=True)
LATENT = Architecture(
    "deepseek2",
    ropes=("default", "yarn"),
    only={"rope_interleave": True, "rms_norm_eps": 1e-6},  # the norms of latents have that epsilon
    gating=SIGMOID,
    grouped=True,
    lite=(26, 27),
)
GRANITE = Architecture("granite", neighbours=True, only={"position_embedding_type": "rope"})
GEMMA_ARCH = Architecture(activations=("gelu_pytorch_tanh",), norm_offset=1.0)
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), LLAMA_ARCH),
    **dict.fromkeys(("cwm", "internlm3", "iquestcoder"), replace(LLAMA_ARCH, unequal=None)),
    # a Helium has neighbours in transformers, too
    "helium": replace(LLAMA_ARCH, unequal=None, neighbours=False),
    "stablelm": Architecture(biases=QKV, only={"qk_layernorm": False}, partial=True),
    "qwen3": Architecture(),
    "mixtral": replace(LLAMA_ARCH, unequal=None),
    "qwen3_moe": Architecture("qwen3moe", only={"norm_topk_prob": True, "mlp_only_layers": []}),
    "qwen2_moe": Architecture(
        "qwen2moe",
        biases=QKV,
        square=QUERIES,
        only={"norm_topk_prob": False, "mlp_only_layers": []},
    ),
    "olmoe": Architecture(square=ROTARY, only={"norm_topk_prob": False, "clip_qkv": None}),
    "granitemoe": Architecture("granitemoe", neighbours=True),
    "gpt_oss": Architecture(
        "gpt-oss",
        biases=QKV | {"self_attn.o_proj"},
        ropes=("default", "yarn"),
        window_period=2,
        only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        in_turn=True,
    ),
    "glm4_moe": Architecture(
        "glm4moe", biases=QKV, only={"n_group": 1}, partial=True, gating=SIGMOID
    ),
    "dots1": Architecture(only={"n_group": 1}, gating=SIGMOID),
    "exaone_moe": Architecture("exaone-moe", window_period=4, only={"n_group": 1}, gating=SIGMOID),
    "deepseek_v3": LATENT,
    # llama.cpp uses rms_norm_eps 1e-5 in the norms of latents, too. transformers has 1e-6 there.
    "glm4_moe_lite": replace(LATENT, ropes=("default",), only={"rope_interleave": True}),
    "deepseek_v2": replace(
        LATENT,
        only={"topk_method": "greedy", "norm_topk_prob": False, "rms_norm_eps": 1e-6},
        gating=SOFTMAX,
        grouped=False,
    ),
    "ernie4_5_moe": Architecture("ernie4_5-moe", gating=SOFTMAX),
    "minimax_m2": Architecture("minimax-m2", partial=True, gating=SIGMOID),
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": replace(DELTA, uniform="qwen35moe"),
    **dict.fromkeys(("granite", "granitemoehybrid"), GRANITE),
    "lfm2": Architecture(square=QUERIES, short=True),
    "cohere": Architecture("command-r", square=QUERIES, only={"use_qk_norm": False}),
    "jais2": Architecture(
        biases=LINEARS, activations=("relu2",), only={"attention_bias": True, "mlp_bias": True}
    ),
    "smollm3": Architecture(neighbours=True, rope_period=4),
    "seed_oss": Architecture(biases=QKV),
    "ernie4_5": Architecture(),
    "arcee": Architecture(neighbours=True, activations=("relu2",)),
    "gemma": GEMMA_ARCH,
    "gemma2": replace(GEMMA_ARCH, window_period=2, scaled="self_attn.q_proj", odd_depth=46),
    "gemma3_text": replace(
        GEMMA_ARCH,
        uniform="gemma3",
        ropes=("default", "linear"),
        window_period=6,
        scaled="self_attn.q_norm",
        odd_depth=62,
    ),
}


def attention_interval(config: Any) -> int:
    """Returns n if every n-th layer has full attention. `architecture_of` has checked the other layers."""
    return [*config.layer_types, "full_attention"].index("full_attention") + 1


def architecture_name(config: JsonObject, shape: ModelShape) -> str | None:
    """Returns llama.cpp's name of the architecture for a model, or None. `config` belongs to the export."""
    try:
        return architecture_of(config_object(text_config(config, "")), shape, "")[1]
    except UserError:
        return None


def architecture_of(config: Any, shape: ModelShape, where: str) -> tuple[Architecture, str]:
    """Returns the architecture of a model, and its name. `config` is transformers' object with defaults."""
    family = family_name(shape.model_type)
    architecture = ARCHITECTURES.get(family)
    if architecture is None:
        tested = ", ".join(ARCHITECTURES)
        raise NotInGguf(
            where, f"GGUF is tested in llama.cpp for {tested}, not for {shape.model_type}"
        )
    name = architecture.uniform or family
    arch = name if shape.is_uniform else architecture.unequal
    if arch is None:
        raise NotInGguf(where, f"llama.cpp's {name} needs layers of one size, but these differ")
    for missing in _missing(architecture, config, shape):
        raise NotInGguf(where, f"GGUF cannot hold {missing} in llama.cpp's {name}")
    return architecture, arch


def _missing(architecture: Architecture, config: Any, shape: ModelShape) -> Iterator[str]:
    """Yields the features of a model that the architecture lacks."""
    keys = [key for key in ACTIVATIONS if getattr(config, key, None)]
    if keys:
        activation = getattr(config, keys[0])
        if activation not in architecture.activations:
            yield f"{keys[0]} {activation!r}"
    biases = {part for name in shape.biases for part in PARTS.get(name, (name,))}
    for name in sorted(biases - architecture.biases):
        yield f"the bias of {name}"
    for _, linear in shape.linears():
        outputs, _ = linear.matrix
        if linear.linear in architecture.square and outputs != shape.hidden_size:
            yield f"{linear.linear} with {outputs} outputs"
    for key, only in architecture.only.items():
        value = getattr(config, key, only)
        if value != only:
            yield f"{key} {value!r}"
    if architecture.delta and config.linear_key_head_dim != config.linear_value_head_dim:
        yield f"linear_value_head_dim {config.linear_value_head_dim} beside {config.linear_key_head_dim}"
    yield from _missing_orders(architecture, config, shape)


def _missing_orders(architecture: Architecture, config: Any, shape: ModelShape) -> Iterator[str]:
    """Yields the unsupported numbers and orders of layers."""
    layers = len(shape.layers)
    dense = [i for i, layer in enumerate(shape.counts) if layer.get("experts") == 0]
    if architecture.gating and dense != list(range(len(dense))):
        yield f"dense layers {dense} among those with experts"
    if architecture.lite and (config.q_lora_rank is None or layers in architecture.lite):
        yield f"{layers} layers with q_lora_rank {config.q_lora_rank}"
    interval = attention_interval(config) if architecture.delta else 0
    for period, key, usual, special in (
        (architecture.window_period, "layer_types", "sliding_attention", "full_attention"),
        (interval, "layer_types", "linear_attention", "full_attention"),
        (architecture.rope_period, "no_rope_layers", 1, 0),
    ):
        if period:
            order = [usual if (i + 1) % period else special for i in range(layers)]
            if getattr(config, key) != order:
                yield f"this order of {key}"
