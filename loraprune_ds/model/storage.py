"""How the ranks store a model's frozen weights, and which rows and columns of each stored tensor a cut keeps."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

from torch import Tensor, nn

from loraprune_ds.config import ModelConfig
from loraprune_ds.model.family_row import Linear, Part
from loraprune_ds.model.frozen import DENSE, WEIGHT, Int8, StorageFormat, StoredTensor, storage_format
from loraprune_ds.model.shapes import LayerKeep, ModelShape, group_indices


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) that stay: `keep` is (kept,) int64, ascending."""

    axis: int
    keep: Tensor


@dataclass(frozen=True)
class FrozenStorage:
    """Stores the linears of the decoder layers in the model's dtype, or as int8 with scales (frozen.py)."""

    int8: bool = False

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        return cls(config.frozen == "int8")

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Returns the storage of a model, or of one decoder layer, in memory."""
        return cls(any(isinstance(storage_format(module), Int8) for module in model.modules()))

    def format_of(self, shape: ModelShape, linear: Linear) -> StorageFormat:
        if not self.int8:
            return DENSE
        return Int8(1, shape.hidden_size) if linear.rows_are_hidden else Int8(0)

    def stored(self, shape: ModelShape, element_size: int, layer: int | None = None) -> dict[str, StoredTensor]:
        """Returns the frozen tensors that ZeRO-3 shards, by name, of a layer or of all."""
        layers = range(len(shape.layers)) if layer is None else [layer]
        formats = {f"{shape.prefix(i)}{x.name}.{WEIGHT}": self.format_of(shape, x) for i, x in shape.linear_ids(layers)}
        stored, keep_fp32 = dict[str, StoredTensor](), shape.keep_fp32
        for name, size in (shape.parameters() if layer is None else shape.layer_parameters(layer)).items():
            if name in formats:
                rows, columns = size
                tensors = formats[name].stored((rows, columns), element_size)
                stored |= {f"{name.removesuffix(WEIGHT)}{tensor}": value for tensor, value in tensors.items()}
            else:
                stored[name] = StoredTensor(size, 4 if name in keep_fp32 else element_size)
        return stored

    def layer_cuts(self, shape: ModelShape, layer: int, keep: LayerKeep) -> Iterator[tuple[str, Slice, Linear | None]]:
        """Yields the stored tensors of a layer that get smaller, apart from LoRA: the name inside the layer, the slice
        that stays, and for a weight its linear.

        Parameters that lose the same rows, such as k_proj and v_proj, share the tensor of indices. The linears that
        lose inputs, such as o_proj and down_proj, keep their full bias.
        """

        @cache
        def kept_of(parts: tuple[Part, ...]) -> Tensor:
            return shape.kept_indices(layer, parts, keep)

        for linear in shape.cut_linears(layer, keep):
            kept = Slice(linear.axis, kept_of(linear.parts))
            for tensor, stays in self.format_of(shape, linear).kept(*kept).items():
                yield f"{linear.name}.{tensor}", kept._replace(keep=stays), linear if tensor == WEIGHT else None
            if linear.axis == 0 and linear.name in shape.biases:
                yield f"{linear.name}.bias", kept, None
        for companion in shape.companions(layer):
            if companion.parts[0].kind in shape.cut_kinds(layer, keep):
                yield companion.name, Slice(companion.axis, kept_of(companion.parts)), None


MODEL_DTYPE = FrozenStorage()


def lora_cuts(linear: Linear, lora_rank: int, weight: Slice, keep: LayerKeep) -> list[tuple[int, Slice]]:
    """Lists the LoRA factors that get smaller, 0 for A or 1 for B, and their slices, by the slice of the weight."""
    if linear.is_stack:
        return [(0, Slice(0, group_indices(keep[linear.kind], lora_rank))), (1, weight)]
    return [(1 - linear.axis, weight)]  # A has the inputs, B the outputs
