"""Mixtures of experts: experts leave. Dense layers and shared experts stay, with LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import transformers

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.families.base import (
    Attention,
    Attribute,
    Family,
    Marks,
    Mixture,
    SmallModel,
)
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
# fields with the number of dense layers, where these are the first
FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
# number of multi-token-prediction layers after the last decoder layer; they are not built
NEXT = "num_nextn_predict_layers"
# transformers 5 writes the number of experts under this name, and also reads the old names
NEW_COUNT = "num_local_experts"


@dataclass(frozen=True)
class Moe(Family):
    """Names the fields of config.json about experts."""

    count: str = "num_experts"  # the number of experts
    size: str = "moe_intermediate_size"  # the channels of one expert
    chosen: str = "num_experts_per_tok"  # the experts that a token chooses
    # > 0: the router first chooses `topk_group` of `n_group` groups, by the sum of this number of best experts in each
    best_of_group: int = 0
    dense_fields: tuple[str, ...] = ()  # they say which layers have no experts
    # the name of the router's correction in weight files, if it differs
    correction_in_files: str | None = None

    has_experts = True
    optional: ClassVar[bool] = False  # some models of the family have no experts
    names: ClassVar = each_expert()  # of the stacks
    router_in_files: ClassVar[str | None] = None  # as `correction_in_files`

    @property
    def required(self) -> tuple[str, ...]:
        sizes = super().required
        if self.optional:
            return sizes
        return (*sizes[:3], self.count, self.size, self.chosen)

    def span(self, c: Any) -> Span:
        """Returns the experts of a layer, as wide as the channels of one."""
        ranges = 1
        if self.best_of_group:
            ranges = c.n_group or 1
        return Span("experts", getattr(c, self.count) or 0, getattr(c, self.size) or 0, ranges)

    def layer(self, c: Any, i: int) -> Marks:
        """Marks the experts of a sparse layer, the MLP of a dense one, and the linears that all tokens pass."""
        span = self.span(c)
        correction = "e_score_correction_bias"
        yield from self.mixer(c)
        yield from stacks("mlp.experts", span, c.hidden_size, self.names)
        yield from whole("mlp", *MLP)
        for shared in SHARED:
            yield from whole(f"mlp.{shared}", *MLP)
        yield from whole("mlp", "shared_expert_gate")
        yield per_expert("mlp.gate.weight", span, self.router_in_files)
        for name in (f"mlp.gate.{correction}", f"mlp.{correction}"):
            yield per_expert(name, span, self.correction_in_files, keep_fp32=True)
        yield per_expert("mlp.gate.wg.weight", span, keep_fp32=True)
        yield Attribute("mlp.gate", "num_experts", span._replace(width=1))

    def mixer(self, c: Any) -> Marks:
        return attention(c, wide_norms=self.wide_norms)

    def mixture(self, c: Any) -> Mixture | None:
        span = self.span(c)
        per_token = getattr(c, self.chosen)
        chosen_ranges = 1
        if self.best_of_group:
            chosen_ranges = c.topk_group or 1
        least_per_range = max(self.best_of_group, -(-per_token // chosen_ranges))
        return Mixture(span.width, per_token, span.ranges * least_per_range)

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        return super().layer_fields(c, counts) | {self.count: counts.get("experts", 0)}

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> JsonObject:
        return super().model_fields(c, layers) | self.dense_layers(layers)

    def check_layers(self, layers: Sequence[LayerCounts], where: str) -> None:
        """Raises UserError if no layer has experts, or if a dense one follows, where config.json counts these."""
        dense = layers_without_experts(layers)
        require(
            self.optional or len(dense) < len(layers),
            f"{where}: no layer has experts; save the model as one of a dense family",
        )
        require(
            {*FIRST_DENSE}.isdisjoint(self.dense_fields) or dense == [*range(len(dense))],
            f"{where}: mlp_layer_types in config.json has a dense layer after a sparse one; "
            f"of a pruned model {FIRST_DENSE[0]} must tell the dense layers, so these must be the first",
        )

    def dense_layers(self, layers: Sequence[LayerCounts]) -> JsonObject:
        dense = layers_without_experts(layers)
        sparse = [i for i in range(len(layers)) if i not in dense] or [len(layers)]
        interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
        types = ["sparse"] * len(layers)
        for i in dense:
            types[i] = "dense"
        fields = {
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "mlp_layer_types": types,
            **dict.fromkeys(FIRST_DENSE, len(dense)),
            "moe_layer_start_index": sparse[0],
            "moe_layer_end_index": sparse[-1],
            "moe_layer_interval": interval,
            NEXT: 0,
        }
        return {name: fields[name] for name in self.dense_fields}


def layers_without_experts(layers: Sequence[LayerCounts]) -> list[int]:
    """Numbers the layers without experts."""
    return [i for i, counts in enumerate(layers) if not counts.get("experts")]


class Mixtral(Moe):
    names = each_expert("block_sparse_moe", ("w1", "w3", "w2"))
    router_in_files = "block_sparse_moe.gate.weight"


class HunyuanMoe(Moe):
    def explicit(self, config: JsonObject) -> JsonObject:
        """Replaces a list with one number of chosen experts per layer, as in published files, by the number."""
        per_layer = config.get("moe_topk")
        if isinstance(per_layer, list) and len(set(per_layer)) == 1:
            return config | {"moe_topk": per_layer[0]}
        return config


class Lfm2Moe(Moe):
    """Its short convolutions are as wide as the residual stream."""

    def layer(self, c: Any, i: int) -> Marks:
        path = "feed_forward"
        mlp = ("w1", "w3", "w2")
        span = self.span(c)
        yield from attention(c)
        yield from whole("conv", "in_proj", "out_proj")
        yield from stacks(f"{path}.experts", span, c.hidden_size, each_expert(path, mlp))
        yield from whole(path, *mlp)
        yield per_expert(f"{path}.gate.weight", span)
        yield per_expert(f"{path}.expert_bias", span, keep_fp32=True)


class ErnieMoe(Moe):
    """Its router is fp32. The correction, (1, experts), has another name in files."""

    def layer(self, c: Any, i: int) -> Marks:
        span = self.span(c)
        correction = "moe_statics.e_score_correction_bias"
        yield from super().layer(c, i)
        yield per_expert("mlp.gate.weight", span, keep_fp32=True)
        one_row = per_expert(f"mlp.gate.{correction}", span, f"mlp.{correction}", keep_fp32=True)
        yield replace(one_row, axis=1)


class GraniteMoe(Moe):
    def layer(self, c: Any, i: int) -> Marks:
        path = "block_sparse_moe"
        names = (f"{path}.input_linear.weight",), (f"{path}.output_linear.weight",)
        span = self.span(c)
        yield from attention(c)
        yield from stacks(f"{path}.experts", span, c.hidden_size, names)
        yield per_expert(f"{path}.router.weight", span, f"{path}.router.layer.weight")


class GptOss(Moe):
    keeps_layers = "vLLM gives every other layer a window, by its number"

    def layer(self, c: Any, i: int) -> Marks:
        path = "mlp.experts"
        names = (f"{path}.gate_up_proj",), (f"{path}.down_proj",)
        span = self.span(c)
        yield from attention(c, sinks=True)
        yield from stacks(path, span, c.hidden_size, names, transposed=True)
        yield per_expert("mlp.router.weight", span)
        yield per_expert("mlp.router.bias", span)
        yield per_expert(f"{path}.gate_up_proj_bias", span)
        yield per_expert(f"{path}.down_proj_bias", span)


class Latent(Moe):
    """DeepSeek's latent attention. Keys of a head are wider than its values, and latents belong to no head."""

    def mixer(self, c: Any) -> Marks:
        heads = Span("heads", c.num_key_value_heads)
        query = heads._replace(width=c.qk_nope_head_dim + c.qk_rope_head_dim)
        key_and_value = heads._replace(width=c.qk_nope_head_dim + c.v_head_dim)
        query_linear = "q_b_proj" if c.q_lora_rank else "q_proj"
        yield rows(f"self_attn.{query_linear}", query)
        yield rows("self_attn.kv_b_proj", key_and_value)
        yield columns("self_attn.o_proj", heads._replace(width=c.v_head_dim))
        yield from whole("self_attn", "q_a_proj", "kv_a_proj_with_mqa")

    def head_dim(self, c: Any) -> int:
        return c.qk_rope_head_dim

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """All heads share one key in the cache."""
        return Attention(layer.counts.get("heads", 0), c.kv_lora_rank + c.qk_rope_head_dim)


class Mistral4(Latent):
    """Its head_dim is the full width of queries. The rotary part is a fraction of it."""

    names = ("mlp.experts.gate_up_proj",), ("mlp.experts.down_proj",)

    def lm_class(self) -> Any:
        return transformers.Mistral4ForCausalLM

    def head_dim(self, c: Any) -> int:
        return c.head_dim


class SparseAttention(Latent):
    """An indexer chooses the tokens that a query reads. The loss does not train it, so it has no LoRA."""

    keeps_layers = "layers may read the tokens that an earlier one has chosen"

    def mixer(self, c: Any) -> Marks:
        yield from super().mixer(c)
        for linear in ("wq_b", "wk", "weights_proj"):
            yield TensorSpec(f"self_attn.indexer.{linear}.weight")

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """An indexer has one key for each token."""
        keys, _ = layer.shapes().get("self_attn.indexer.wk.weight", (0, 0))
        latent = super().attention(c, layer)
        return latent._replace(cached=latent.cached + keys)

    def around(self, c: Any, i: int) -> SmallModel:
        """A layer without an indexer takes the tokens of the one before it."""
        first = max(j for j in range(i + 1) if c.indexer_types[j] == "full")
        return [*range(first, i + 1)], {}
