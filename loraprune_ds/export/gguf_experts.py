"""The tensors of experts in a GGUF file. llama.cpp has gate and up apart, each for all experts of a layer."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from loraprune_ds.model.shapes import ModelShape

BIAS = "_proj_bias"  # how names of biases end that have a row for each expert
# By the last name of a stack, what llama.cpp has of it. A stock GGUF converter calls these tensors so, too.
PARTS = {"gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"), "down": ("mlp.experts.down_proj",)}


class OfExperts(NamedTuple):
    """Tells where the rows of each expert are in the source.

    Attributes:
        count: experts of the layer.
        shape: of one expert in the source, which has one after another.
        take: the rows of it, or the columns if it is transposed.
    """

    count: int
    shape: tuple[int, ...]
    take: slice
    transposed: bool

    def read(self, read_flat: Callable[[int, int], Tensor]) -> Tensor:
        """Returns (count, rows, ...).

        Args:
            read_flat: (start, end) -> these elements of the source.
        """
        numel = torch.Size(self.shape).numel()
        blocks = (read_flat(i * numel, (i + 1) * numel).view(self.shape) for i in range(self.count))
        return torch.stack([(block.T if self.transposed else block)[self.take] for block in blocks])


def expert_parts(
    source: str, size: tuple[int, ...], shape: ModelShape, in_turn: bool
) -> Iterator[tuple[str, tuple[int, ...], OfExperts]]:
    """Splits a stack of experts, or the biases of one. Yields each part's name, its shape, and where it is.

    Args:
        in_turn: the outputs of gate and up lie in turn. Else those of gate come first.
    """
    _, _, layer, inside = source.split(".", 3)
    for stack in (linear for linear in shape.linears(int(layer)) if linear.is_stack):
        experts = shape.layers[int(layer)][stack.kind]
        if inside == f"{stack.name}.weight":
            what, one, transposed = "weight", (size[0] // experts, size[1]), stack.transposed
        elif inside == f"{stack.name}{BIAS}":
            what, one, transposed = "bias", size[1:], False
        else:
            continue
        outputs, *inputs = reversed(one) if transposed else one
        parts = PARTS[stack.name.rpartition(".")[2]]
        for name, take in zip(parts, _places(len(parts), outputs, in_turn), strict=True):
            part_size = (experts, outputs // len(parts), *inputs)
            yield f"model.layers.{layer}.{name}.{what}", part_size, OfExperts(experts, one, take, transposed)


def _places(parts: int, outputs: int, in_turn: bool) -> list[slice]:
    if parts == 1:
        return [slice(None)]
    return [slice(0, None, 2), slice(1, None, 2)] if in_turn else [slice(0, outputs // 2), slice(outputs // 2, None)]
