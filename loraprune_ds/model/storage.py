"""Decides how a run stores the frozen linears of its decoder layers: `model.frozen`."""

from typing import NamedTuple

import torch

from loraprune_ds.config_types import Frozen
from loraprune_ds.errors import UserError
from loraprune_ds.model.codecs import BLOCK, CODECS, INT8
from loraprune_ds.model.frozen import Blocks, StoredTensor
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.units import format_bytes


class Storage(NamedTuple):
    """Stores linears unchanged, as int8 or as NF4. Stacks of experts are int8 in place of NF4.

    Attributes:
        refits: cuts refit the linears that lose inputs. These are int8 in place of NF4, because a refit rounds again.
        dtype: of the model.
    """

    frozen: Frozen | None = None
    refits: bool = False
    dtype: torch.dtype = torch.bfloat16

    def format(self, tensor: TensorSpec) -> Blocks | None:
        """Returns the format of a linear with LoRA. None for other tensors and without `frozen`: stored unchanged."""
        if self.frozen is None or not tensor.lora:
            return None
        is_refitted = self.refits and tensor.loses_inputs
        codec = INT8 if tensor.stack or is_refitted else CODECS[self.frozen]
        return Blocks(codec, self.dtype, tensor.loses_inputs)

    def formats(self, shape: ModelShape) -> dict[str, Blocks]:
        """Returns the formats of all weights that are stored in blocks, by name."""
        return {
            prefix + tensor.name: stored_as
            for prefix, tensor in shape.tensors()
            if (stored_as := self.format(tensor))
        }

    def parts(self, tensor: TensorSpec) -> dict[str, StoredTensor]:
        """Returns the tensors that ZeRO-3 shards for this one, by name inside the layer."""
        stored_as = self.format(tensor)
        if stored_as is None:
            dtype = torch.float32 if tensor.keep_fp32 else self.dtype
            return {tensor.name: StoredTensor(tensor.shape, dtype)}
        parts = stored_as.stored(tensor.matrix)
        return {tensor.stored_name(name): part for name, part in parts.items()}

    def stored(self, shape: ModelShape) -> dict[str, StoredTensor]:
        """Returns the frozen tensors that ZeRO-3 shards, by name."""
        return {
            prefix + name: part
            for prefix, tensor in shape.tensors()
            for name, part in self.parts(tensor).items()
        }

    def linear_bytes(self, shape: ModelShape) -> int:
        """Counts the bytes of all linears with LoRA, LoRA itself apart."""
        of_linears = (self.parts(linear).values() for _, linear in shape.linears())
        return sum(part.nbytes for parts in of_linears for part in parts)

    def describe(self, shape: ModelShape, *, taught: bool) -> str:
        """Says how linears are stored, and what refits add, and a teacher."""
        alone = self._replace(refits=False).linear_bytes(shape)
        of_format = f"{self.frozen} linears" if self.frozen else "linears"
        parts = [f"{of_format} of {format_bytes(alone)}"]
        refitted = self.linear_bytes(shape) - alone
        if refitted:
            parts.append(f"{format_bytes(refitted)} more for int8 where refits write")
        if taught:
            parts.append(f"{format_bytes(alone)} more for the teacher's")
        return ", ".join(parts)

    def check(self, shape: ModelShape, model: str) -> None:
        """Raises UserError, which names the `model`, if a linear lacks whole blocks that its codec needs."""
        for layer, linear in shape.linears():
            stored_as = self.format(linear)
            if stored_as and not stored_as.fits(linear.matrix):
                raise UserError(
                    f"{model}: {shape.prefix(layer)}{linear.name} has no whole blocks of {BLOCK} "
                    "along its hidden axis; set model.frozen: int8"
                )


AS_THEY_ARE = Storage()
