"""LoRA on experts as PEFT has it on transformers' tensors of all experts of a layer (`target_parameters`).

A is the same there: (experts · r, in_features). B is (out_features, r · experts), and its columns belong to the experts
in turn. PEFT wraps down_proj around gate_up_proj, so the latter is the `base_layer`.
"""

from collections.abc import Mapping

from torch import Tensor

# Stack of a run -> (where PEFT keeps its LoRA, the tensor of transformers). Both are paths inside a decoder layer.
IN_PEFT = {
    "mlp.experts.gate_up": ("mlp.experts.base_layer", "mlp.experts.gate_up_proj"),
    "mlp.experts.down": ("mlp.experts", "mlp.experts.down_proj"),
}


def as_in_peft(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and reorders the LoRA of a decoder layer ("{linear}.lora_A"). Plain linears stay as they are."""
    found: dict[str, Tensor] = {}
    for name, factor in lora.items():
        linear, _, which = name.rpartition(".")
        path = IN_PEFT[linear][0] if linear in IN_PEFT else linear
        if linear in IN_PEFT and which == "lora_B":
            lora_rank = factor.shape[1]
            experts = len(lora[f"{linear}.lora_A"]) // lora_rank
            factor = factor.view(experts, -1, lora_rank).permute(1, 2, 0).flatten(1)
        found[f"{path}.{which}"] = factor.contiguous()
    return found
