"""Families whose layers differ in more than numbers: in their mixers, or in the widths of heads and MLPs."""

from typing import Any, ClassVar

from loraprune_ds.files import JsonObject
from loraprune_ds.model.families.base import (
    Attention,
    Attribute,
    Family,
    Marks,
    Prefixes,
    SmallModel,
)
from loraprune_ds.model.families.blocks import (
    attention,
    columns,
    mlp,
    per_expert,
    rows,
    stacks,
    whole,
)
from loraprune_ds.model.families.moe import Moe
from loraprune_ds.model.groups import Kind, LayerCounts, LayerSpec, Span, TensorSpec

NET = "linear_attn"
MIXER = "mixer"


class Delta(Family):
    """Qwen's gated delta nets: layers without attention. A group is one key head with its value heads.

    transformers loads decays in the model's dtype, vLLM A_log in fp32. Some checkpoints have them in fp32.
    """

    def mixer(self, c: Any) -> Marks:
        keys, values, value_heads = delta_spans(c)
        yield from attention(c, gated=True)
        yield rows(f"{NET}.in_proj_qkv", keys, keys, values)
        yield rows(f"{NET}.in_proj_z", values)
        # The rows of each key head stand together.
        yield rows(f"{NET}.in_proj_qkvz", keys._replace(width=2 * (keys.width + values.width)))
        yield columns(f"{NET}.out_proj", values)
        yield TensorSpec(f"{NET}.in_proj_a.weight", (value_heads,))
        yield TensorSpec(f"{NET}.in_proj_b.weight", (value_heads,))
        both = value_heads._replace(width=2 * value_heads.width)
        yield TensorSpec(f"{NET}.in_proj_ba.weight", (both,))
        yield TensorSpec(f"{NET}.conv1d.weight", (keys, keys, values))
        yield TensorSpec(f"{NET}.dt_bias", (value_heads,), keep_fp32=True)
        yield TensorSpec(f"{NET}.A_log", (value_heads,), keep_fp32=True)
        yield Attribute(NET, "key_dim", keys)
        yield Attribute(NET, "value_dim", values)
        yield Attribute(NET, "num_k_heads", keys._replace(width=1))
        yield Attribute(NET, "num_v_heads", value_heads)

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        keys = counts.get("delta", 0)
        values_per_key = c.linear_num_value_heads // c.linear_num_key_heads
        return super().layer_fields(c, counts) | {
            "linear_num_key_heads": keys,
            "linear_num_value_heads": keys * values_per_key,
        }

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        keys, values, _ = delta_spans(c)
        state = layer.counts.get("delta", 0) * keys.width * values.width
        return super().attention(c, layer)._replace(state=state)


def delta_spans(c: Any) -> tuple[Span, Span, Span]:
    """Returns the spans of keys, of values, and of value heads."""
    span = Span("delta", c.linear_num_key_heads)
    values_per_key = c.linear_num_value_heads // c.linear_num_key_heads
    keys = span._replace(width=c.linear_key_head_dim)
    values = span._replace(width=c.linear_value_head_dim * values_per_key)
    return keys, values, span._replace(width=values_per_key)


class Qwen35(Delta):
    def layer(self, c: Any, i: int) -> Marks:
        yield from self.mixer(c)
        yield from mlp(c.intermediate_size)


class DeltaMoe(Delta, Moe):
    """Takes `mixer` from Delta and the rest from Moe."""


class NemotronH(Moe):
    """Each layer has one mixer: Mamba-2, attention, an MLP or experts. MLP and experts have no gate.

    Mamba-2 stays. PEFT refuses LoRA on its `out_proj`, because fused kernels read the weight without it.
    """

    optional = True
    prefixes: ClassVar[Prefixes] = Prefixes("backbone.")
    layer_letters = ("hybrid_override_pattern",)

    def layer(self, c: Any, i: int) -> Marks:
        span = self.span(c)
        hidden = c.moe_latent_size or c.hidden_size
        expert = f"{MIXER}.experts.{{}}"
        names = (f"{expert}.up_proj.weight",), (f"{expert}.down_proj.weight",)
        yield from attention(c, MIXER)
        yield from mlp(c.intermediate_size, MIXER)
        yield from whole(MIXER, "fc1_latent_proj")
        yield from stacks(f"{MIXER}.experts", span, hidden, names, gated=False)
        yield from whole(MIXER, "fc2_latent_proj")
        yield from whole(MIXER, "shared_experts.up_proj", "shared_experts.down_proj")
        yield per_expert(f"{MIXER}.gate.weight", span, keep_fp32=True)
        yield per_expert(f"{MIXER}.gate.e_score_correction_bias", span, keep_fp32=True)
        yield Attribute(f"{MIXER}.gate", "num_experts", span._replace(width=1))
        yield from whole(MIXER, "in_proj")
        yield TensorSpec(f"{MIXER}.out_proj.weight")

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        state = 0
        if f"{MIXER}.A_log" in layer.shapes():
            state = c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        return super().attention(c, layer)._replace(state=state)

    def explicit(self, config: JsonObject) -> JsonObject:
        """Counts the layers, as transformers 5 does."""
        types = config.get("layers_block_type") or config["hybrid_override_pattern"]
        return config | {"num_hidden_layers": len(types)}


class Gemma4(Moe):
    """Sliding and full attention differ in the width and number of heads, but share the number of query heads.

    All heads stay for that reason. Some models have experts next to the channels of a dense MLP. The last layers may
    have twice the channels.
    """

    optional = True
    keeps_layers = "its last layers read keys and values of others, and its embedding has a part for each layer"

    def layer(self, c: Any, i: int) -> Marks:
        names = ("experts.gate_up_proj",), ("experts.down_proj",)
        span = self.span(c)
        yield from whole("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
        yield from mlp(c.intermediate_size * self.times(c, i, "channels"))
        yield from stacks("experts", span, c.hidden_size, names)
        yield TensorSpec("per_layer_input_gate.weight", lora=True)
        yield TensorSpec("per_layer_projection.weight", lora=True)
        yield per_expert("router.proj.weight", span)
        yield per_expert("router.per_expert_scale", span)

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        shapes = layer.shapes()
        keys, _ = shapes.get("self_attn.k_proj.weight", (0, 0))  # a layer may read another's keys
        return Attention(c.num_attention_heads, 2 * keys)

    def times(self, c: Any, i: int, kind: Kind) -> int:
        is_double = c.use_double_wide_mlp and i >= _first_shared(c)
        return 2 if kind == "channels" and is_double else 1

    def around(self, c: Any, i: int) -> SmallModel:
        """The last layer has full attention. Layers that share keys and values need one of each type before them."""
        types = list(c.layer_types)
        if i < _first_shared(c):
            return [i, types.index("full_attention")], {"num_kv_shared_layers": 0}
        one_of_each = [types.index(name) for name in sorted(set(types))]
        return [*one_of_each, i, c.num_hidden_layers - 1], {"num_kv_shared_layers": 2}

    def explicit(self, config: JsonObject) -> JsonObject:
        """Gives the sizes of full attention their published names, which servers read. transformers saves others."""
        if not config.get("per_layer_config"):
            return config
        explicit = dict(config)
        full_attention, *_ = explicit.pop("per_layer_config").values()
        names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
        for name, field in names.items():
            if field in full_attention:
                explicit[name] = full_attention[field]
        return explicit


def _first_shared(c: Any) -> int:
    """Returns the first of the last layers, which read keys and values of earlier layers."""
    return c.num_hidden_layers - c.num_kv_shared_layers
