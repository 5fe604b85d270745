"""Nemotron-H: a layer has one mixer, which is Mamba-2, attention, an MLP or experts. MLP and experts have no gate.

Mamba-2 stays. PEFT refuses LoRA on its `out_proj`, which fused kernels read past LoRA.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from loraprune_ds.model.families.base import Attention, Attribute, Marks
from loraprune_ds.model.families.blocks import attention, mlp, per_expert, stacks, whole
from loraprune_ds.model.families.moe import Moe
from loraprune_ds.model.groups import LayerCounts, LayerSpec, TensorSpec

MIXER, EXPERT = "mixer", "mixer.experts.{}"


class NemotronH(Moe):
    optional = True
    on_disk: ClassVar[str] = "backbone."

    def layer(self, c: Any, i: int) -> Marks:
        run, inputs = self.run(c), c.moe_latent_size or c.hidden_size
        names = (f"{EXPERT}.up_proj.weight",), (f"{EXPERT}.down_proj.weight",)
        router = (f"{MIXER}.gate.{x}" for x in ("weight", "e_score_correction_bias"))
        return [
            *attention(c, path=MIXER),
            *mlp(c.intermediate_size, MIXER),
            *whole(MIXER, "fc1_latent_proj"),
            *stacks(f"{MIXER}.experts", run, inputs, names, gated=False),
            *whole(MIXER, "fc2_latent_proj", "shared_experts.up_proj", "shared_experts.down_proj"),
            *(per_expert(name, run, keep_fp32=True) for name in router),
            Attribute(f"{MIXER}.gate", "num_experts", run._replace(width=1)),
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

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> dict[str, Any]:
        """The layers that predict further tokens are no part of the model."""
        return super().model_fields(c, layers) | {"num_nextn_predict_layers": 0}
