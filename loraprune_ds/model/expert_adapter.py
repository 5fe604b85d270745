"""LoRA on experts as PEFT has it on transformers' tensors of all experts of a layer (`target_parameters`).

A is the same there: (experts · r, in_features). B is (out_features, r · experts), and its columns belong to the experts
in turn. PEFT wraps down_proj around gate_up_proj, so the latter is the `base_layer`. Of a transposed stack the two
factors change their places, as PEFT's A always has the inputs.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from loraprune_ds.model.family_row import Linear


class InPeft(NamedTuple):
    """Names the paths of a stack inside a decoder layer: of PEFT's LoRA, and of the tensor of transformers."""

    lora: str
    tensor: str


def in_peft(stack: Linear) -> InPeft:
    """Tells where PEFT has a stack of a run."""
    experts, _, last = stack.name.rpartition(".")
    return InPeft(experts if last == "down" else f"{experts}.base_layer", f"{stack.name}_proj")


def as_in_peft(lora: Mapping[str, Tensor], linears: Iterable[Linear]) -> dict[str, Tensor]:
    """Renames and reorders the LoRA of a decoder layer ("{linear}.lora_A"). Plain linears stay as they are."""
    found: dict[str, Tensor] = {}
    for linear in linears:
        a, b = (lora[f"{linear.name}.lora_{which}"] for which in "AB")
        path = linear.name
        if linear.is_stack:
            path, lora_rank = in_peft(linear).lora, b.shape[1]
            of_a, of_b = a.unflatten(0, (-1, lora_rank)), b.unflatten(0, (len(a) // lora_rank, -1))
            if linear.transposed:
                of_a, of_b = of_b.transpose(1, 2), of_a.transpose(1, 2)
            a, b = of_a.flatten(0, 1), of_b.permute(1, 2, 0).flatten(1)
        found |= {f"{path}.lora_A": a.contiguous(), f"{path}.lora_B": b.contiguous()}
    return found


def from_peft(lora: Mapping[str, Tensor], linears: Iterable[Linear], lora_rank: int) -> dict[str, Tensor]:
    """Undoes `as_in_peft`."""
    found: dict[str, Tensor] = {}
    for linear in linears:
        path = in_peft(linear).lora if linear.is_stack else linear.name
        a, b = (lora[f"{path}.lora_{which}"] for which in "AB")
        if linear.is_stack:
            of_a, of_b = a.unflatten(0, (-1, lora_rank)), b.unflatten(1, (lora_rank, -1)).permute(2, 0, 1)
            if linear.transposed:
                of_a, of_b = of_b.transpose(1, 2), of_a.transpose(1, 2)
            a, b = of_a.flatten(0, 1), of_b.flatten(0, 1)
        found |= {f"{linear.name}.lora_A": a.contiguous(), f"{linear.name}.lora_B": b.contiguous()}
    return found
