"""Decides how a run stores the frozen linears of its decoder layers: `model.frozen`."""

import math
from typing import NamedTuple

import torch

from loraprune_ds.config_types import Frozen
from loraprune_ds.errors import UserError
from loraprune_ds.model.frozen import BLOCK, DENSE, StorageFormat, StoredTensor
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.nf4 import NF4
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.units import format_bytes


class Storage(NamedTuple):
    """Stores linears as they are, as int8 or as NF4. Stacks of experts are int8 in place of NF4.

    Attributes:
        refits: cuts refit the linears that lose inputs. These are int8 in place of NF4, because a refit rounds again.
        dtype: in which NF4 weights compute.
    """

    frozen: Frozen | None = None
    refits: bool = False
    dtype: torch.dtype = torch.bfloat16

    def format(self, tensor: TensorSpec) -> StorageFormat:
        """Returns the format that ranks store. All others than linears with LoRA are stored as they are."""
        if self.frozen is None or not tensor.lora:
            return DENSE
        is_refitted = self.refits and tensor.loses_inputs
        if self.frozen == "nf4" and not tensor.stack and not is_refitted:
            return NF4(int(tensor.loses_inputs), self.dtype)
        return tensor.format(int8=True)

    def parts(self, tensor: TensorSpec, element_size: int) -> dict[str, StoredTensor]:
        """Returns the tensors that ZeRO-3 shards for this one, by name inside the layer."""
        if not tensor.lora:
            return tensor.stored(element_size, int8=False)
        parts = self.format(tensor).stored(tensor.matrix, element_size)
        return {tensor.stored_name(name): part for name, part in parts.items()}

    def stored(self, shape: ModelShape, element_size: int) -> dict[str, StoredTensor]:
        """Returns the frozen tensors that ZeRO-3 shards, by name."""
        tensors = shape.stored(element_size, int8=False)
        for layer, linear in shape.linears():
            prefix = shape.prefix(layer)
            del tensors[prefix + linear.name]
            for name, stored in self.parts(linear, element_size).items():
                tensors[prefix + name] = stored
        return tensors

    def linear_bytes(self, shape: ModelShape) -> int:
        """Counts the bytes of all linears with LoRA, LoRA itself apart."""
        parts = (
            stored
            for _, linear in shape.linears()
            for stored in self.format(linear).stored(linear.matrix, self.dtype.itemsize).values()
        )
        return sum(stored.element_size * math.prod(stored.shape) for stored in parts)

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
        """Raises UserError, which names the `model`, if a linear has no whole blocks of NF4 along its hidden axis."""
        for layer, linear in shape.linears():
            stored_as = self.format(linear)
            if isinstance(stored_as, NF4) and linear.matrix[1 - stored_as.axis] % BLOCK:
                raise UserError(
                    f"{model}: {shape.prefix(layer)}{linear.name} has no whole blocks of {BLOCK} "
                    "along its hidden axis; set model.frozen: int8"
                )


AS_THEY_ARE = Storage()
