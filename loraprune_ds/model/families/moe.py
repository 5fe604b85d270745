"""Mixtures of experts: experts leave. Dense layers and shared experts stay, with LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import transformers

from loraprune_ds.model.families.base import Attention, Attribute, Family, Marks, Mixture
from loraprune_ds.model.families.blocks import (
    MLP,
    attention,
    columns,
    each_expert,
    per_expert,
    rows,
    stacks,
    whole,
)
from loraprune_ds.model.groups import LayerCounts, LayerSpec, Span, TensorSpec

SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # names of the MLP that all tokens pass
# fields that count the dense layers, which are the first
FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
# the field that counts layers after the last, which are no part of the model
NEXT = "num_nextn_predict_layers"
# transformers 5 writes the number of experts under this name, and reads the old ones
NEW_COUNT = "num_local_experts"


@dataclass(frozen=True)
class Moe(Family):
    """Names the fields of config.json about experts."""

    count: str = "num_experts"  # the number of experts
    size: str = "moe_intermediate_size"  # the channels of one
    chosen: str = "num_experts_per_tok"  # how many a token chooses
    # if > 0 the router first chooses `topk_group` of `n_group` groups, by so many of each
    best_of_group: int = 0
    dense_fields: tuple[str, ...] = ()  # they say which layers have no experts
    # the name of the router's correction there, if it differs
    correction_in_files: str | None = None

    has_experts = True
    optional: ClassVar[bool] = False  # some models of the family have none
    names: ClassVar = each_expert()  # of the stacks
    router_in_files: ClassVar[str | None] = None  # as `correction_in_files`

    @property
    def required(self) -> tuple[str, ...]:
        sizes = super().required
        return sizes if self.optional else (*sizes[:3], self.count, self.size, self.chosen)

    def span(self, c: Any) -> Span:
        """Returns the experts of a layer, as wide as the channels of one."""
        ranges = c.n_group or 1 if self.best_of_group else 1
        return Span("experts", getattr(c, self.count) or 0, getattr(c, self.size) or 0, ranges)

    def layer(self, c: Any, i: int) -> Marks:
        """Marks the experts of a sparse layer, the MLP of a dense one, and the linears that all tokens pass."""
        span, corrections = (
            self.span(c),
            (f"mlp.{path}e_score_correction_bias" for path in ("gate.", "")),
        )
        return [
            *self.mixer(c),
            *stacks("mlp.experts", span, c.hidden_size, self.names),
            *whole("mlp", *MLP),
            *(linear for x in SHARED for linear in whole(f"mlp.{x}", *MLP)),
            *whole("mlp", "shared_expert_gate"),
            per_expert("mlp.gate.weight", span, self.router_in_files),
            *(
                per_expert(name, span, self.correction_in_files, keep_fp32=True)
                for name in corrections
            ),
            per_expert("mlp.gate.wg.weight", span, keep_fp32=True),
            Attribute("mlp.gate", "num_experts", span._replace(width=1)),
        ]

    def mixer(self, c: Any) -> Marks:
        return attention(c, wide_norms=self.wide_norms)

    def mixture(self, c: Any) -> Mixture | None:
        span, per_token = self.span(c), getattr(c, self.chosen)
        chosen = c.topk_group or 1 if self.best_of_group else 1
        return Mixture(
            span.width, per_token, span.ranges * max(self.best_of_group, -(-per_token // chosen))
        )

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        return super().layer_fields(c, counts) | {self.count: counts.get("experts", 0)}

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> dict[str, Any]:
        dense = [i for i, counts in enumerate(layers) if not counts.get("experts")]
        return super().model_fields(c, layers) | self.dense_layers(dense, len(layers))

    def dense_layers(self, dense: list[int], layers: int) -> dict[str, Any]:
        sparse = [i for i in range(layers) if i not in dense] or [layers]
        assert dense == [*range(len(dense))] or not {*FIRST_DENSE} & {*self.dense_fields}
        fields = {
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "mlp_layer_types": ["dense" if i in dense else "sparse" for i in range(layers)],
            **dict.fromkeys(FIRST_DENSE, len(dense)),
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
            NEXT: 0,
        }
        return {name: fields[name] for name in self.dense_fields}


class Mixtral(Moe):
    names = each_expert("block_sparse_moe", ("w1", "w3", "w2"))
    router_in_files = "block_sparse_moe.gate.weight"


class HunyuanMoe(Moe):
    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Published ones list how many experts a token chooses in each layer."""
        each = config.get("moe_topk")
        return (
            config | {"moe_topk": each[0]}
            if isinstance(each, list) and len({*each}) == 1
            else config
        )


class Lfm2Moe(Moe):
    """Its short convolutions are as wide as the residual stream."""

    def layer(self, c: Any, i: int) -> Marks:
        path, names, span = "feed_forward", ("w1", "w3", "w2"), self.span(c)
        return [
            *attention(c),
            *whole("conv", "in_proj", "out_proj"),
            *stacks(f"{path}.experts", span, c.hidden_size, each_expert(path, names)),
            *whole(path, *names),
            per_expert(f"{path}.gate.weight", span),
            per_expert(f"{path}.expert_bias", span, keep_fp32=True),
        ]


class ErnieMoe(Moe):
    """Its router is fp32. The correction, (1, experts), has another name in files."""

    def layer(self, c: Any, i: int) -> Marks:
        span, bias = self.span(c), "moe_statics.e_score_correction_bias"
        router = per_expert("mlp.gate.weight", span, keep_fp32=True)
        one_row = per_expert(f"mlp.gate.{bias}", span, f"mlp.{bias}", keep_fp32=True)
        return [*super().layer(c, i), router, replace(one_row, axis=1)]


class GraniteMoe(Moe):
    def layer(self, c: Any, i: int) -> Marks:
        path, span = "block_sparse_moe", self.span(c)
        names = (f"{path}.input_linear.weight",), (f"{path}.output_linear.weight",)
        router = per_expert(f"{path}.router.weight", span, f"{path}.router.layer.weight")
        return [*attention(c), *stacks(f"{path}.experts", span, c.hidden_size, names), router]


class GptOss(Moe):
    keeps_layers = "vLLM gives every other layer a window, by its number"

    def layer(self, c: Any, i: int) -> Marks:
        path, span = "mlp.experts", self.span(c)
        names = (f"{path}.gate_up_proj",), (f"{path}.down_proj",)
        router = ("mlp.router.weight", "mlp.router.bias")
        biases = (f"{path}.gate_up_proj_bias", f"{path}.down_proj_bias")
        return [
            *attention(c, sinks=True),
            *stacks(path, span, c.hidden_size, names, transposed=True),
            *(per_expert(name, span) for name in (*router, *biases)),
        ]


class Latent(Moe):
    """DeepSeek's latent attention: keys of a head are wider than its values, and latents belong to no head."""

    def mixer(self, c: Any) -> Marks:
        heads, query = c.num_key_value_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        return [
            rows(
                "self_attn.q_b_proj" if c.q_lora_rank else "self_attn.q_proj",
                Span("heads", heads, query),
            ),
            rows("self_attn.kv_b_proj", Span("heads", heads, c.qk_nope_head_dim + c.v_head_dim)),
            columns("self_attn.o_proj", Span("heads", heads, c.v_head_dim)),
            *whole("self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
        ]

    def head_dim(self, c: Any) -> int:
        return c.qk_rope_head_dim

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """All heads share one key in the cache. Scores and sums differ in width, and this is their mean."""
        heads, width = (
            layer.counts.get("heads", 0),
            (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) / 2,
        )
        return Attention(heads, heads * width, c.kv_lora_rank + c.qk_rope_head_dim)


class Mistral4(Latent):
    """Its head_dim is the width of queries, and the rotary part a fraction of it."""

    names = ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",)

    def lm_class(self) -> Any:
        return transformers.Mistral4ForCausalLM

    def head_dim(self, c: Any) -> int:
        return c.head_dim


class SparseAttention(Latent):
    """An indexer chooses the tokens that a query reads. It learns nothing from the loss, so it has no LoRA."""

    keeps_layers = "layers may read the tokens that an earlier one has chosen"

    def mixer(self, c: Any) -> Marks:
        indexer = (
            TensorSpec(f"self_attn.indexer.{x}.weight") for x in ("wq_b", "wk", "weights_proj")
        )
        return [*super().mixer(c), *indexer]

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """An indexer has one key for each token."""
        keys, _ = layer.shapes().get("self_attn.indexer.wk.weight", (0, 0))
        found = super().attention(c, layer)
        return found._replace(cached=found.cached + keys)

    def around(self, c: Any, i: int) -> tuple[list[int], dict[str, Any]]:
        """A layer without an indexer takes the tokens of the one before it."""
        first = max(j for j in range(i + 1) if c.indexer_types[j] == "full")
        return [*range(first, i + 1)], {}
