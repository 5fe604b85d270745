"""The rows and columns of every tensor of a decoder layer that stay in a cut, by the table of families (family.py)."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from torch import Tensor

from loraprune_ds.model.family_row import Linear, Part
from loraprune_ds.model.frozen import WEIGHT
from loraprune_ds.model.shapes import LayerKeep, ModelShape, group_indices


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) that stay: `keep` is (kept,) int64, ascending."""

    axis: int
    keep: Tensor


def layer_cuts(shape: ModelShape, layer: int, keep: LayerKeep) -> Iterator[tuple[str, Slice, Linear | None]]:
    """Yields the parameters of a layer that get smaller, apart from LoRA: the name inside the layer, the slice that
    stays, and for a weight its linear.

    Parameters that lose the same rows, such as k_proj and v_proj, share the tensor of indices. The linears that lose
    inputs, such as o_proj and down_proj, keep their whole bias.
    """

    @cache
    def kept_of(parts: tuple[Part, ...]) -> Tensor:
        return shape.kept_indices(layer, parts, keep)

    for linear in shape.cut_linears(layer, keep):
        kept = Slice(linear.axis, kept_of(linear.parts))
        for tensor, stays in shape.form(linear).kept(*kept).items():
            yield f"{linear.name}.{tensor}", kept._replace(keep=stays), linear if tensor == WEIGHT else None
        if linear.axis == 0 and linear.name in shape.biases:
            yield f"{linear.name}.bias", kept, None
    for companion in shape.companions(layer):
        if companion.parts[0].kind in shape.cut_kinds(layer, keep):
            yield companion.name, Slice(0, kept_of(companion.parts)), None


def lora_cuts(linear: Linear, lora_rank: int, weight: Slice, keep: LayerKeep) -> list[tuple[int, Slice]]:
    """Lists the LoRA factors that get smaller, 0 for A or 1 for B, and their slices. `weight` is that of the linear."""
    if linear.is_stack:
        return [(0, Slice(0, group_indices(keep[linear.kind], lora_rank))), (1, weight)]
    return [(1 - linear.axis, weight)]  # A has the inputs, B the outputs
