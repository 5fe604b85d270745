"""Gemma 4: full attention has other widths than sliding attention, and the last layers may have twice the channels."""

from typing import Any

from loraprune_ds.model.families.base import Attention, Marks, Mixture
from loraprune_ds.model.families.blocks import mlp, per_expert, stacks, whole
from loraprune_ds.model.families.moe import Moe
from loraprune_ds.model.groups import Kind, LayerSpec, TensorSpec


class Gemma4(Moe):
    """Sliding and full attention differ in the width and number of heads, and share the count of queries.

    So heads stay. Only some models have experts, beside the channels of a dense MLP.
    """

    optional = True

    def layer(self, c: Any, i: int) -> Marks:
        names, run = (("experts.gate_up_proj",), ("experts.down_proj",)), self.run(c)
        return [
            *whole("self_attn", "q_proj", "k_proj", "v_proj", "o_proj"),
            *mlp(c.intermediate_size * self.times(c, i, "channels")),
            *stacks("experts", run, c.hidden_size, names),
            *(TensorSpec(f"per_layer_{x}.weight", lora=True) for x in ("input_gate", "projection")),
            *(per_expert(x, run) for x in ("router.proj.weight", "router.per_expert_scale")),
        ]

    def mixture(self, c: Any) -> Mixture | None:
        return super().mixture(c) if self.run(c).groups else None

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        shapes = layer.shapes()
        keys, _ = shapes.get("self_attn.k_proj.weight", (0, 0))  # a layer may read those of another
        return Attention(c.num_attention_heads, shapes["self_attn.q_proj.weight"][0], 2 * keys)

    def times(self, c: Any, i: int, kind: Kind) -> int:
        return 2 if kind == "channels" and c.use_double_wide_mlp and i >= _first_shared(c) else 1

    def around(self, c: Any, i: int) -> tuple[list[int], dict[str, Any]]:
        """The last layer has full attention. Layers that share keys and values need one of each type before them."""
        types, last, shares = list(c.layer_types), c.num_hidden_layers - 1, i >= _first_shared(c)
        chosen = [*map(types.index, sorted(set(types))), i, last] if shares else [i, types.index("full_attention")]
        return chosen, {"num_kv_shared_layers": 2 * shares}

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Gives the sizes of full attention the published names, which servers read. transformers saves others."""
        if not (own := config.get("per_layer_config")):
            return config
        full, rest = next(iter(own.values())), {key: x for key, x in config.items() if key != "per_layer_config"}
        names = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}
        return rest | {name: full[field] for name, field in names.items() if field in full}


def _first_shared(c: Any) -> int:
    """Returns the first of the last layers, which read keys and values of others."""
    return c.num_hidden_layers - c.num_kv_shared_layers
