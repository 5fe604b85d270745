"""What a cut leaves of every tensor of a decoder layer. The table of families (family.py) says what it takes."""

from collections.abc import Iterator

from loraprune_ds.model.family_row import Companion, Linear, Part
from loraprune_ds.model.frozen import WEIGHT
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.slices import Slice, along, stack_slice


def layer_cuts(shape: ModelShape, layer: int, keep: LayerKeep) -> Iterator[tuple[str, Slice, Linear | None]]:
    """Yields all parameters of a layer that get smaller, LoRA apart.

    Each is its name inside the layer, what stays, and the linear whose weight it is, for `lora_cuts`.

    What is cut alike, such as k_proj and v_proj, has one tensor of it. The linears that lose inputs, such as o_proj and
    down_proj, keep their whole bias.
    """
    alike: dict[tuple[int, tuple[Part, ...]], Slice] = {}
    for linear in shape.cut_linears(layer, keep):
        kept = alike.get((linear.axis, linear.parts)) or _slice(shape, layer, linear, keep)
        if kept is None:
            continue
        if not linear.is_stack:
            alike[linear.axis, linear.parts] = kept
        for tensor, stays in shape.form(linear).kept(kept.axis, kept.keep).items():
            yield f"{linear.name}.{tensor}", kept._replace(keep=stays), linear if tensor == WEIGHT else None
        if linear.axis == 0 and shape.has_bias(linear):
            yield f"{linear.name}.bias", kept, None
    kinds = shape.cut_kinds(layer, keep)
    for companion in shape.companions(layer):
        cut = companion.channels or companion.parts[0].kind in kinds
        if cut and (kept := _slice(shape, layer, companion, keep)):
            yield companion.name, kept, None


def lora_cuts(
    shape: ModelShape, layer: int, linear: Linear, lora_rank: int, weight: Slice, keep: LayerKeep
) -> list[tuple[int, Slice]]:
    """Lists what gets smaller of LoRA: 0 for A or 1 for B, and what stays of it.

    Args:
        weight: what stays of the linear's weight.
    """
    if not linear.is_stack:
        return [(1 - linear.axis, weight)]  # A has the inputs, B the outputs
    counts, channels = shape.layers[layer], linear.channels
    rows = shape.width(linear.parts[0].width, counts)
    cuts = (
        (0, stack_slice(counts, keep, lora_rank, along(channels, 1))),
        (1, stack_slice(counts, keep, rows, along(channels, 0))),
    )
    return [(which, kept) for which, kept in cuts if kept]


def _slice(shape: ModelShape, layer: int, tensor: Linear | Companion, keep: LayerKeep) -> Slice | None:
    """Returns what stays of a weight, or of a companion. None if nothing goes."""
    counts, parts = shape.layers[layer], tensor.parts
    if shape.family.mixture and parts[0].kind == "experts":
        return stack_slice(counts, keep, shape.width(parts[0].width, counts), tensor.channels)
    axis = tensor.axis if isinstance(tensor, Linear) else 0
    return Slice(axis, shape.kept_indices(layer, parts, keep))
