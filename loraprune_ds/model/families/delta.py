"""Qwen's gated delta nets: layers without attention. A group is one key head with its value heads."""

from typing import Any

from loraprune_ds.model.families.base import Attention, Attribute, Family, Marks
from loraprune_ds.model.families.blocks import columns, head_runs, mlp, rows
from loraprune_ds.model.families.moe import Qwen2Moe
from loraprune_ds.model.groups import LayerCounts, LayerSpec, Run, TensorSpec

NET = "linear_attn"


class Delta(Family):
    def mixer(self, c: Any) -> Marks:
        """Marks attention, where the query of each head comes with the gate of its output, and the net of others."""
        queries, keys = head_runs(c)
        inputs = (("q", queries._replace(width=2 * queries.width)), ("k", keys), ("v", keys))
        attention = (*(rows(f"self_attn.{x}_proj", run) for x, run in inputs), columns("self_attn.o_proj", queries))
        return [*attention, *self.net(*delta_runs(c))]

    def net(self, keys: Run, values: Run, each: Run) -> Marks:
        return [
            rows(f"{NET}.in_proj_qkv", keys, keys, values),
            rows(f"{NET}.in_proj_z", values),
            columns(f"{NET}.out_proj", values),
            *(TensorSpec(f"{NET}.in_proj_{x}.weight", (each,)) for x in "ab"),
            *self.state(keys, values, each),
        ]

    def state(self, keys: Run, values: Run, each: Run) -> Marks:
        """transformers loads decays in the model's dtype, vLLM A_log in fp32. Some checkpoints have them in fp32."""
        return [
            TensorSpec(f"{NET}.conv1d.weight", (keys, keys, values)),
            *(TensorSpec(f"{NET}.{x}", (each,), keep_fp32=True) for x in ("dt_bias", "A_log")),
            Attribute(NET, "key_dim", keys),
            Attribute(NET, "value_dim", values),
        ]

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        keys, each = counts.get("delta", 0), c.linear_num_value_heads // c.linear_num_key_heads
        return super().layer_fields(c, counts) | {"linear_num_key_heads": keys, "linear_num_value_heads": keys * each}

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        keys, values, _ = delta_runs(c)
        return super().attention(c, layer)._replace(state=layer.counts.get("delta", 0) * keys.width * values.width)


def delta_runs(c: Any) -> tuple[Run, Run, Run]:
    """Returns the runs of keys, of values, and of value heads."""
    run, each = Run("delta", c.linear_num_key_heads), c.linear_num_value_heads // c.linear_num_key_heads
    keys, values = run._replace(width=c.linear_key_head_dim), run._replace(width=c.linear_value_head_dim * each)
    return keys, values, run._replace(width=each)


class Qwen35(Delta):
    def layer(self, c: Any, i: int) -> Marks:
        return [*self.mixer(c), *mlp(c.intermediate_size)]


class Qwen35Moe(Delta, Qwen2Moe):
    """Takes `mixer` from Delta and the rest from Qwen2Moe. It has no dense layers."""

    dense_mlp = ()

    def dense_layers(self, dense: list[int], layers: int) -> dict[str, Any]:
        return {}


class Qwen3Next(Delta, Qwen2Moe):
    """Has all of a key head together. Takes `mixer` from Delta and the rest from Qwen2Moe."""

    def net(self, keys: Run, values: Run, each: Run) -> Marks:
        return [
            rows(f"{NET}.in_proj_qkvz", keys._replace(width=2 * (keys.width + values.width))),
            columns(f"{NET}.out_proj", values),
            TensorSpec(f"{NET}.in_proj_ba.weight", (each._replace(width=2 * each.width),)),
            *self.state(keys, values, each),
            Attribute(NET, "num_k_heads", keys._replace(width=1)),
            Attribute(NET, "num_v_heads", each),
        ]
