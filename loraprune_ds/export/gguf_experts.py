"""Tensors of a GGUF file that have a block for each expert, or for each head of latent attention.

llama.cpp has gate and up apart, each for all experts of a layer. It has the rows of `kv_b_proj` that make keys apart
from those that make values. The former are transposed, as it multiplies queries by them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from loraprune_ds.model.shapes import ModelShape

BIAS = "_proj_bias"  # how names of biases end that have a row for each expert
# By the last name of a stack, what llama.cpp has of it. A stock GGUF converter calls these tensors so, too.
PARTS = {"gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"), "down": ("mlp.experts.down_proj",)}


class Blocks(NamedTuple):
    """Tells where the block of each expert (or head) is in the source.

    Attributes:
        count: experts of the layer.
        shape: of one block in the source, which has one after another.
        take: what is taken of it along each axis.
        transposed: it is stored so.
    """

    count: int
    shape: tuple[int, ...]
    take: tuple[slice, ...]
    transposed: bool

    def read(self, read_flat: Callable[[int, int], Tensor]) -> Tensor:
        """Returns (count, rows, ...).

        Args:
            read_flat: (start, end) -> these elements of the source.
        """
        numel = torch.Size(self.shape).numel()
        blocks = (read_flat(i * numel, (i + 1) * numel).view(self.shape) for i in range(self.count))
        taken = (block[self.take] for block in blocks)
        return torch.stack([block.T if self.transposed else block for block in taken])


def expert_parts(
    source: str, size: tuple[int, ...], shape: ModelShape, in_turn: bool
) -> Iterator[tuple[str, tuple[int, ...], Blocks]]:
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
            place = (slice(None), take) if transposed else (take,)
            yield f"model.layers.{layer}.{name}.{what}", part_size, Blocks(experts, one, place, transposed)


def latent_parts(source: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], Blocks]]:
    """Splits the projection of latent keys and values. Yields as `expert_parts`."""
    _, _, layer, inside = source.split(".", 3)
    if inside != "self_attn.kv_b_proj.weight":
        return
    heads, rank, both = shape.layers[int(layer)]["heads"], *map(shape.width, ("key_value_rank", "key_and_value"))
    keys, one = both - shape.width("value"), (both, rank)
    name = source.replace("kv_b_proj", "{}_b_proj")
    yield name.format("k"), (heads, rank, keys), Blocks(heads, one, (slice(0, keys),), True)
    yield name.format("v"), (heads, both - keys, rank), Blocks(heads, one, (slice(keys, both),), False)


def _places(parts: int, outputs: int, in_turn: bool) -> list[slice]:
    if parts == 1:
        return [slice(None)]
    return [slice(0, None, 2), slice(1, None, 2)] if in_turn else [slice(0, outputs // 2), slice(outputs // 2, None)]
