"""Families whose layers differ in more than numbers: in their mixers, or in the widths of heads and MLPs."""

from typing import Any, ClassVar

from loraprune_ds.model.families.base import Attention, Attribute, Family, Marks, Prefixes
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
MIXER, EXPERT = "mixer", "mixer.experts.{}"


class Delta(Family):
    """Qwen's gated delta nets: layers without attention. A group is one key head with its value heads.

    transformers loads decays in the model's dtype, vLLM A_log in fp32. Some checkpoints have them in fp32.
    """

    def mixer(self, c: Any) -> Marks:
        keys, values, each = delta_spans(c)
        return [
            *attention(c, gated=True),
            rows(f"{NET}.in_proj_qkv", keys, keys, values),
            rows(f"{NET}.in_proj_z", values),
            # each key head together
            rows(f"{NET}.in_proj_qkvz", keys._replace(width=2 * (keys.width + values.width))),
            columns(f"{NET}.out_proj", values),
            *(TensorSpec(f"{NET}.in_proj_{x}.weight", (each,)) for x in "ab"),
            TensorSpec(f"{NET}.in_proj_ba.weight", (each._replace(width=2 * each.width),)),
            TensorSpec(f"{NET}.conv1d.weight", (keys, keys, values)),
            *(TensorSpec(f"{NET}.{x}", (each,), keep_fp32=True) for x in ("dt_bias", "A_log")),
            Attribute(NET, "key_dim", keys),
            Attribute(NET, "value_dim", values),
            Attribute(NET, "num_k_heads", keys._replace(width=1)),
            Attribute(NET, "num_v_heads", each),
        ]

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        keys, each = counts.get("delta", 0), c.linear_num_value_heads // c.linear_num_key_heads
        return super().layer_fields(c, counts) | {
            "linear_num_key_heads": keys,
            "linear_num_value_heads": keys * each,
        }

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        keys, values, _ = delta_spans(c)
        return (
            super()
            .attention(c, layer)
            ._replace(state=layer.counts.get("delta", 0) * keys.width * values.width)
        )


def delta_spans(c: Any) -> tuple[Span, Span, Span]:
    """Returns the spans of keys, of values, and of value heads."""
    span, each = (
        Span("delta", c.linear_num_key_heads),
        c.linear_num_value_heads // c.linear_num_key_heads,
    )
    keys, values = (
        span._replace(width=c.linear_key_head_dim),
        span._replace(width=c.linear_value_head_dim * each),
    )
    return keys, values, span._replace(width=each)


class Qwen35(Delta):
    def layer(self, c: Any, i: int) -> Marks:
        return [*self.mixer(c), *mlp(c.intermediate_size)]


class DeltaMoe(Delta, Moe):
    """Takes `mixer` from Delta and the rest from Moe."""


class NemotronH(Moe):
    """A layer has one mixer, which is Mamba-2, attention, an MLP or experts. MLP and experts have no gate.

    Mamba-2 stays. PEFT refuses LoRA on its `out_proj`, which fused kernels read past LoRA.
    """

    optional = True
    prefixes: ClassVar[Prefixes] = Prefixes("backbone.")
    layer_letters = ("hybrid_override_pattern",)

    def layer(self, c: Any, i: int) -> Marks:
        span, inputs = self.span(c), c.moe_latent_size or c.hidden_size
        names = (f"{EXPERT}.up_proj.weight",), (f"{EXPERT}.down_proj.weight",)
        router = (f"{MIXER}.gate.{x}" for x in ("weight", "e_score_correction_bias"))
        return [
            *attention(c, MIXER),
            *mlp(c.intermediate_size, MIXER),
            *whole(MIXER, "fc1_latent_proj"),
            *stacks(f"{MIXER}.experts", span, inputs, names, gated=False),
            *whole(MIXER, "fc2_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
            *(per_expert(name, span, keep_fp32=True) for name in router),
            Attribute(f"{MIXER}.gate", "num_experts", span._replace(width=1)),
            *whole(MIXER, "in_proj"),
            TensorSpec(f"{MIXER}.out_proj.weight"),
        ]

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        is_mamba = f"{MIXER}.A_log" in layer.shapes()
        state = c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        return super().attention(c, layer)._replace(state=is_mamba * state)

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Counts the layers, as transformers 5 does."""
        types = config.get("layers_block_type") or config["hybrid_override_pattern"]
        return config | {"num_hidden_layers": len(types)}


class Gemma4(Moe):
    """Sliding and full attention differ in the width and number of heads, and share the count of queries.

    So heads stay. Only some models have experts, beside the channels of a dense MLP. The last layers may have twice the
    channels.
    """

    optional = True
    keeps_layers = "its last layers read keys and values of others, and its embedding has a part for each layer"

    def layer(self, c: Any, i: int) -> Marks:
        names, span = (("experts.gate_up_proj",), ("experts.down_proj",)), self.span(c)
        return [
            *whole("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *mlp(c.intermediate_size * self.times(c, i, "channels")),
            *stacks("experts", span, c.hidden_size, names),
            *(TensorSpec(f"per_layer_{x}.weight", lora=True) for x in ("input_gate", "projection")),
            *(per_expert(x, span) for x in ("router.proj.weight", "router.per_expert_scale")),
        ]

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        shapes = layer.shapes()
        keys, _ = shapes.get("self_attn.k_proj.weight", (0, 0))  # a layer may read those of another
        return Attention(c.num_attention_heads, shapes["self_attn.q_proj.weight"][0], 2 * keys)

    def times(self, c: Any, i: int, kind: Kind) -> int:
        return 2 if kind == "channels" and c.use_double_wide_mlp and i >= _first_shared(c) else 1

    def around(self, c: Any, i: int) -> tuple[list[int], dict[str, Any]]:
        """The last layer has full attention. Layers that share keys and values need one of each type before them."""
        types, last, shares = list(c.layer_types), c.num_hidden_layers - 1, i >= _first_shared(c)
        chosen = (
            [*map(types.index, sorted(set(types))), i, last]
            if shares
            else [i, types.index("full_attention")]
        )
        return chosen, {"num_kv_shared_layers": 2 * shares}

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Gives the sizes of full attention the published names, which servers read. transformers saves others."""
        if not (own := config.get("per_layer_config")):
            return config
        full, rest = (
            next(iter(own.values())),
            {key: x for key, x in config.items() if key != "per_layer_config"},
        )
        names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
        return rest | {name: full[field] for name, field in names.items() if field in full}


def _first_shared(c: Any) -> int:
    """Returns the first of the last layers, which read keys and values of others."""
    return c.num_hidden_layers - c.num_kv_shared_layers
