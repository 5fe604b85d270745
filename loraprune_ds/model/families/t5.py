"""T5: an encoder and its decoder, whose attention to the encoder has heads of a kind of its own.

Layers of a T5 share the bias of the first. With a copy in each, as a UMT5 has it, any heads may leave.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loraprune_ds.model.families.base import PRUNED, Attention, Attribute, Family, LayerList, Marks
from loraprune_ds.model.families.blocks import columns, rows
from loraprune_ds.model.groups import Kind, LayerCounts, LayerSpec, Span, TensorSpec

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
# their fields in config.json
COUNTS = {"heads": "num_heads", "cross_heads": "num_cross_heads", "channels": "d_ff"}


class Umt5(Family):
    layer_lists = (
        LayerList("encoder.block", "num_layers"),
        LayerList("decoder.block", "num_decoder_layers"),
    )
    # else results depend on the number of ranks
    in_memory: ClassVar[Mapping[str, Any]] = {"dropout_rate": 0.0}
    per_layer = "layer_sizes"
    keeps_layers = "encoder and decoder are not compared"
    as_many: ClassVar[Mapping[Kind, Kind]] = {"cross_heads": "heads"}
    required = ("d_model", "vocab_size", "num_heads", "d_ff")

    def layer(self, c: Any, i: int) -> Marks:
        """The MLP of a decoder layer comes after the attention to the encoder."""
        heads, cross_heads = (
            Span("heads", c.num_heads, c.d_kv),
            Span("cross_heads", c.num_cross_heads, c.d_kv),
        )
        channels, mlps = (
            Span("channels", c.d_ff),
            ("layer.1.DenseReluDense", "layer.2.DenseReluDense"),
        )
        return [
            *_attention("layer.0.SelfAttention", heads),
            *_attention("layer.1.EncDecAttention", cross_heads),
            # one, or two of a gate
            *(rows(f"{mlp}.{x}", channels) for mlp in mlps for x in ("wi", "wi_0", "wi_1")),
            *(columns(f"{mlp}.wo", channels) for mlp in mlps),
            TensorSpec(BIAS, (heads._replace(width=1),), axis=1),
        ]

    def head_dim(self, c: Any) -> int:
        return c.d_kv

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """Only the decoder has a cache: of its tokens, and of one of the encoder's for each."""
        heads, cross = (layer.counts.get(kind, 0) for kind in ("heads", "cross_heads"))
        return Attention(
            heads, (heads + cross) * c.d_kv, 2 * (heads + cross) * c.d_kv * layer.layer_list
        )

    def around(self, c: Any, i: int) -> tuple[list[int], dict[str, Any]]:
        return ([i, c.num_layers] if i < c.num_layers else [0, i]), {}

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Names what the classes have as defaults, and whether the decoder's outputs are scaled before the head."""
        old = config["model_type"] == "t5"
        tied = config.get("tie_word_embeddings") is not False and config["model_type"] != "mt5"
        defaults = {
            "feed_forward_proj": "relu" if old else "gated-gelu",
            "scale_decoder_outputs": tied,
        }
        defaults |= {"num_cross_heads": config["num_heads"], "is_encoder_decoder": True}
        decoder = config.get("num_decoder_layers")
        own = {"num_decoder_layers": config["num_layers"] if decoder is None else decoder}
        return defaults | config | own

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        return {COUNTS[kind]: count for kind, count in counts.items()}

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> dict[str, Any]:
        return {}

    def export_types(
        self, own: str, source: dict[str, Any], c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """For a stock umt5 AutoTokenizer wants tokenizer.json, which a ByT5 lacks."""
        return (
            [PRUNED + "umt5"]
            if source.get("tokenizer_class") == "ByT5Tokenizer"
            else ["umt5", PRUNED + "umt5"]
        )


class T5(Umt5):
    in_memory: ClassVar[Mapping[str, Any]] = {**Umt5.in_memory, "model_type": "umt5"}
    shared_bias = BIAS

    def export_types(
        self, own: str, source: dict[str, Any], c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        return (
            [own, PRUNED + "umt5"]
            if self.shares_bias(c, layers)
            else super().export_types(own, source, c, layers)
        )

    def shares_bias(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        return self.is_uniform(c, layers) and layers[0].counts["heads"] == c.num_heads


def _attention(name: str, span: Span) -> Marks:
    return [
        *(rows(f"{name}.{x}", span) for x in "qkv"),
        columns(f"{name}.o", span),
        Attribute(name, "n_heads", span._replace(width=1)),
    ]
