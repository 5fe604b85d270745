"""Dense decoders: LLaMA, and those that differ from it in a few words."""

from collections.abc import Sequence
from typing import Any

from loraprune_ds.model.families.base import PRUNED, Attribute, Family, Marks
from loraprune_ds.model.families.blocks import (
    attention,
    columns,
    head_spans,
    mlp,
    per_query,
    rows,
    whole,
)
from loraprune_ds.model.groups import LayerCounts, LayerSpec, Span, TensorSpec


class Llama(Family):
    def layer(self, c: Any, i: int) -> Marks:
        return [*attention(c, wide_norms=self.wide_norms), *mlp(c.intermediate_size)]

    def export_types(
        self, own: str, source: dict[str, Any], c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """A Llama without biases may become a Mistral, whose class wants no head count that divides hidden_size."""
        biased = any(tensor.name.endswith(".bias") for layer in layers for tensor in layer.tensors)
        second = ["mistral"] if own == "llama" and not biased else []
        return [own, *second, PRUNED + own]


class Cohere(Llama):
    def layer(self, c: Any, i: int) -> Marks:
        """The norms have a weight for each head, (heads, head_dim)."""
        keys = tuple(span._replace(width=1) for span in head_spans(c)[1])
        norms = per_query("self_attn.q_norm.weight", c), TensorSpec("self_attn.k_norm.weight", keys)
        return [*super().layer(c, i), *norms]


class Phi3(Family):
    """Its query heads leave with their key-value head, however few there are: all are in one tensor."""

    def layer(self, c: Any, i: int) -> Marks:
        count, each = (
            Span("heads", c.num_key_value_heads),
            c.num_attention_heads // c.num_key_value_heads,
        )
        queries, keys = (count._replace(width=heads * self.head_dim(c)) for heads in (each, 1))
        return [
            rows("self_attn.qkv_proj", queries, keys, keys),
            columns("self_attn.o_proj", queries),
            *mlp(c.intermediate_size),
            Attribute("self_attn", "num_key_value_heads", count),
            Attribute("self_attn.config", "num_attention_heads", count._replace(width=each)),
        ]


class Lfm3(Family):
    """Each query head has a gate. Its short convolutions are as wide as the residual stream."""

    def layer(self, c: Any, i: int) -> Marks:
        gates = per_query("self_attn.g_proj.weight", c, on_disk="self_attn.gate_proj.weight")
        convolution = whole("conv", "in_proj", "out_proj")
        return [*attention(c), *convolution, *mlp(c.intermediate_size, "feed_forward"), gates]


class Lfm2(Lfm3):
    """Has no gates."""

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Writes the width of the MLP, which the class computes from other fields."""
        width = config.get("block_ff_dim", config.get("intermediate_size", 12288))
        if config.get("block_auto_adjust_ff_dim", True):
            width, factor = int(2 * width / 3), config.get("block_ffn_dim_multiplier", 1.0)
            multiple = config.get("block_multiple_of", 256)
            width = width if factor is None else multiple * -(-int(factor * width) // multiple)
        rest = {key: value for key, value in config.items() if key != "block_ff_dim"}
        return rest | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


class GraniteHybrid(Family):
    """The inner width of its Mamba is a multiple of hidden_size. Its fused kernels read `out_proj` past LoRA."""

    required = (*Family.required[:3], "shared_intermediate_size")

    def layer(self, c: Any, i: int) -> Marks:
        mamba, span = whole("mamba", "in_proj"), Span("channels", c.shared_intermediate_size)
        shared = (
            rows("shared_mlp.input_linear", span, span),
            columns("shared_mlp.output_linear", span),
        )
        return [*attention(c), *mamba, TensorSpec("mamba.out_proj.weight"), *shared]

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        channels = {"shared_intermediate_size": counts.get("channels", 0), "intermediate_size": 0}
        return super().layer_fields(c, counts) | channels
