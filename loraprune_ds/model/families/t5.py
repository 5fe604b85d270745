"""T5: an encoder and its decoder. Heads of the decoder's attention to the encoder are a separate kind.

Layers of a T5 share the bias of the first. A UMT5 has a copy in each, so any heads may leave.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loraprune_ds.files import JsonObject
from loraprune_ds.model.families.base import (
    PRUNED,
    Attention,
    Attribute,
    Family,
    LayerList,
    Marks,
    SmallModel,
)
from loraprune_ds.model.families.blocks import columns, rows
from loraprune_ds.model.groups import Kind, LayerCounts, LayerSpec, Span, TensorSpec

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
MLPS = ("layer.1.DenseReluDense", "layer.2.DenseReluDense")  # in the encoder, in the decoder
# the field of each kind in config.json
COUNTS = {"heads": "num_heads", "cross_heads": "num_cross_heads", "channels": "d_ff"}


class Umt5(Family):
    layer_lists = (
        LayerList("encoder.block", "num_layers"),
        LayerList("decoder.block", "num_decoder_layers"),
    )
    # With dropout, results would depend on the number of ranks.
    in_memory: ClassVar[Mapping[str, Any]] = {"dropout_rate": 0.0}
    per_layer = "layer_sizes"
    keeps_layers = "encoder and decoder are not compared"
    as_many: ClassVar[Mapping[Kind, Kind]] = {"cross_heads": "heads"}
    required = ("d_model", "vocab_size", "num_heads", "d_ff")

    def layer(self, c: Any, i: int) -> Marks:
        """The MLP of a decoder layer comes after the attention to the encoder."""
        heads = Span("heads", c.num_heads, c.d_kv)
        channels = Span("channels", c.d_ff)
        yield from _attention("layer.0.SelfAttention", heads)
        yield from _attention(
            "layer.1.EncDecAttention", Span("cross_heads", c.num_cross_heads, c.d_kv)
        )
        for mlp in MLPS:
            yield rows(f"{mlp}.wi", channels)  # in place of the gate's two
            yield rows(f"{mlp}.wi_0", channels)
            yield rows(f"{mlp}.wi_1", channels)
            yield columns(f"{mlp}.wo", channels)
        yield TensorSpec(BIAS, (heads._replace(width=1),), axis=1)

    def head_dim(self, c: Any) -> int:
        return c.d_kv

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """Only the decoder has a cache. For each of its tokens, one token of the encoder counts too."""
        heads = layer.counts.get("heads", 0)
        width = (heads + layer.counts.get("cross_heads", 0)) * c.d_kv
        return Attention(heads, 2 * width * layer.layer_list)

    def around(self, c: Any, i: int) -> SmallModel:
        if i < c.num_layers:
            return [i, c.num_layers], {}  # with the first layer of the decoder
        return [0, i], {}

    def explicit(self, config: JsonObject) -> JsonObject:
        """Writes defaults of the classes, and whether the decoder's outputs are scaled before the head."""
        is_t5 = config["model_type"] == "t5"
        tied = config.get("tie_word_embeddings") is not False and config["model_type"] != "mt5"
        defaults = {
            "feed_forward_proj": "relu" if is_t5 else "gated-gelu",
            "scale_decoder_outputs": tied,
            "num_cross_heads": config["num_heads"],
            "is_encoder_decoder": True,
        }
        decoder_layers = config.get("num_decoder_layers")
        if decoder_layers is None:
            decoder_layers = config["num_layers"]
        return defaults | config | {"num_decoder_layers": decoder_layers}

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        return {COUNTS[kind]: count for kind, count in counts.items()}

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> JsonObject:
        return {}

    def export_types(
        self, model_type: str, source: JsonObject, c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """AutoTokenizer wants tokenizer.json for a stock umt5, but a ByT5 has none."""
        pruned = PRUNED + "umt5"
        if self.shares_bias(c, layers):
            return [model_type, pruned]
        if source.get("tokenizer_class") == "ByT5Tokenizer":
            return [pruned]
        return ["umt5", pruned]

    def shares_bias(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        if self.shared_bias is None:
            return False
        return self.is_uniform(c, layers) and layers[0].counts["heads"] == c.num_heads


class T5(Umt5):
    in_memory: ClassVar[Mapping[str, Any]] = {**Umt5.in_memory, "model_type": "umt5"}
    shared_bias = BIAS


def _attention(name: str, span: Span) -> Marks:
    for linear in "qkv":
        yield rows(f"{name}.{linear}", span)
    yield columns(f"{name}.o", span)
    yield Attribute(name, "n_heads", span._replace(width=1))
