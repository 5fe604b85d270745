"""Dense decoders: LLaMA, and those that differ from it in a few words."""

from collections.abc import Sequence
from typing import Any

from loraprune_ds.files import JsonObject
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
        yield from attention(c, wide_norms=self.wide_norms)
        yield from mlp(c.intermediate_size)

    def export_types(
        self, model_type: str, source: JsonObject, c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """A Llama without biases may become a Mistral, whose class accepts any head count."""
        names = [tensor.name for layer in layers for tensor in layer.tensors]
        has_biases = any(name.endswith(".bias") for name in names)
        stock = [model_type]
        if model_type == "llama" and not has_biases:
            stock.append("mistral")
        return [*stock, PRUNED + model_type]


class Cohere(Llama):
    def layer(self, c: Any, i: int) -> Marks:
        """The norms have a weight for each head, (heads, head_dim)."""
        yield from super().layer(c, i)
        yield per_query("self_attn.q_norm.weight", c)
        _, keys = head_spans(c)
        yield TensorSpec("self_attn.k_norm.weight", tuple(x._replace(width=1) for x in keys))


class Phi3(Family):
    """Query heads always leave with their key-value head, because one tensor holds queries, keys and values."""

    def layer(self, c: Any, i: int) -> Marks:
        heads = Span("heads", c.num_key_value_heads)
        query_heads = heads._replace(width=c.num_attention_heads // c.num_key_value_heads)
        keys = heads._replace(width=self.head_dim(c))
        queries = heads._replace(width=query_heads.width * keys.width)
        yield rows("self_attn.qkv_proj", queries, keys, keys)
        yield columns("self_attn.o_proj", queries)
        yield from mlp(c.intermediate_size)
        yield Attribute("self_attn", "num_key_value_heads", heads)
        yield Attribute("self_attn.config", "num_attention_heads", query_heads)


class Lfm3(Family):
    """Each query head has a gate. The short convolutions are as wide as the residual stream."""

    def layer(self, c: Any, i: int) -> Marks:
        yield from attention(c)
        yield from whole("conv", "in_proj", "out_proj")
        yield from mlp(c.intermediate_size, "feed_forward")
        yield per_query("self_attn.g_proj.weight", c, on_disk="self_attn.gate_proj.weight")


class Lfm2(Lfm3):
    """Like Lfm3 without gates."""

    def explicit(self, config: JsonObject) -> JsonObject:
        """Writes the width of the MLP, which the class computes from other fields."""
        width = config.get("block_ff_dim", config.get("intermediate_size", 12288))
        if config.get("block_auto_adjust_ff_dim", True):
            width = int(2 * width / 3)
            factor = config.get("block_ffn_dim_multiplier", 1.0)
            multiple = config.get("block_multiple_of", 256)
            if factor is not None:
                width = multiple * -(-int(factor * width) // multiple)
        rest = {key: value for key, value in config.items() if key != "block_ff_dim"}
        return rest | {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


class GraniteHybrid(Family):
    """The inner width of its Mamba is a multiple of hidden_size. Fused kernels read `out_proj` without its LoRA."""

    required = (*Family.required[:3], "shared_intermediate_size")

    def layer(self, c: Any, i: int) -> Marks:
        span = Span("channels", c.shared_intermediate_size)
        yield from attention(c)
        yield from whole("mamba", "in_proj")
        yield TensorSpec("mamba.out_proj.weight")
        yield rows("shared_mlp.input_linear", span, span)
        yield columns("shared_mlp.output_linear", span)

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        channels = {"shared_intermediate_size": counts.get("channels", 0), "intermediate_size": 0}
        return super().layer_fields(c, counts) | channels
