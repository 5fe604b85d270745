"""DeepSeek's latent attention. Queries and keys of a head are wider than its values. Latents belong to no head."""

from typing import Any

from loraprune_ds.model.families.base import Attention, Marks
from loraprune_ds.model.families.blocks import columns, rows, whole
from loraprune_ds.model.families.moe import GlmMoe
from loraprune_ds.model.tensors import LayerSpec, Run


class Latent(GlmMoe):
    def mixer(self, c: Any) -> Marks:
        heads, query = c.num_key_value_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        return [
            *(rows(f"self_attn.{x}_proj", Run("heads", heads, query)) for x in ("q", "q_b")),  # a model has one of them
            rows("self_attn.kv_b_proj", Run("heads", heads, c.qk_nope_head_dim + c.v_head_dim)),
            columns("self_attn.o_proj", Run("heads", heads, c.v_head_dim)),
            *whole("self_attn", "q_a_proj", "kv_a_proj_with_mqa"),
        ]

    def head_dim(self, c: Any) -> int:
        return c.qk_rope_head_dim

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        """All heads share one key in the cache. Scores and sums differ in width, and this is their mean."""
        heads, width = layer.counts.get("heads", 0), (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) / 2
        return Attention(heads, heads * width, c.kv_lora_rank + c.qk_rope_head_dim)


class DeepseekV2(Latent):
    corrects = False


class GlmLite(Latent):
    def dense_layers(self, dense: list[int], layers: int) -> dict[str, Any]:
        """Writes the list of transformers 5, and the number that vLLM reads."""
        types = ["dense" if i in dense else "sparse" for i in range(layers)]
        return {"mlp_layer_types": types} | super().dense_layers(dense, layers)
