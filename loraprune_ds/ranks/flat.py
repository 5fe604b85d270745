"""The geometry of ZeRO-3's flat shards, and of a cut on them. It needs no communication and no DeepSpeed.

ZeRO-3 views a tensor as one row-major flat vector of N elements. Rank r owns the shard [r*P, (r+1)*P), with
P = ceil(N / world_size). The last shards are padded and may be empty. A cut keeps the order of the rest, so the kept
elements of a shard [s, e) are [kept_before(s), kept_before(e)) of the smaller tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.ranks.device import to_device

# Elements of LoRA's factors and gradients in one all-gather: 32 MiB, or one layer.
GATHERED_NUMEL = 1 << 23


def partition_numel(numel: int, world_size: int) -> int:
    """Returns the elements of one rank's shard, padding included: ceil(numel / world_size)."""
    return -(-numel // world_size)


def owned_range(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Returns [start, end) of the elements that `rank` owns, without padding. start == end for an empty shard."""
    size = partition_numel(numel, world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def pad(flat: Tensor, numel: int) -> Tensor:
    """Pads a flat tensor with zeros to `numel` elements. Copies only if needed."""
    return flat if len(flat) == numel else torch.nn.functional.pad(flat, (0, numel - len(flat)))


def without_padding(shards: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the tensor of `shape` from the padded shards of all ranks: (world_size, shard)."""
    return shards.reshape(-1)[: math.prod(shape)].view(tuple(shape))


def layer_owner(layer: int, world_size: int) -> int:
    """Returns the rank that holds the full tensors of a layer: moments, refits, files of a checkpoint."""
    return layer % world_size


def owner_rounds(layers: int, world_size: int) -> list[range]:
    """Returns rounds of `world_size` layers, each with a different owner, so all owners work in parallel."""
    return [range(first, min(first + world_size, layers)) for first in range(0, layers, world_size)]


def gather_rounds(sizes: list[int], most: int) -> list[range]:
    """Returns rounds of consecutive layers. A round has at most `most` elements, or a single layer."""
    rounds: list[range] = []
    first = 0
    numel = 0
    for layer, size in enumerate(sizes):
        if layer > first and size and numel + size > most:
            rounds.append(range(first, layer))
            first = layer
            numel = 0
        numel += size
    return [*rounds, range(first, len(sizes))]


def overlap(start_a: Tensor, end_a: Tensor, start_b: Tensor, end_b: Tensor) -> Tensor:
    """Returns the number of elements that two ranges share. Broadcasts."""
    return (torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)).clamp(min=0)


@dataclass(frozen=True)
class AxisCut:
    """A cut along one axis. `keep` lists the rows (axis 0) or columns (axis 1) that stay: (kept,) int64, ascending."""

    shape: tuple[int, ...]  # before the cut. With axis 0 all later dimensions count as one
    axis: int
    keep: Tensor

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def new_shape(self) -> tuple[int, ...]:
        return (*self.shape[: self.axis], len(self.keep), *self.shape[self.axis + 1 :])

    def kept_before(self, positions: Tensor) -> Tensor:
        """Counts the kept elements before each flat position (int64, same shape), by a binary search."""
        row = positions // self.columns
        column = positions % self.columns
        if self.axis == 1:
            return row * len(self.keep) + torch.searchsorted(self.keep, column)
        rows = torch.searchsorted(self.keep, row)
        row_is_kept = torch.searchsorted(self.keep, row, right=True) - rows
        return rows * self.columns + column * row_is_kept


class ReshardPlan:
    """Holds the elements that one rank sends to and receives from each rank in a cut, itself included, in rank order.

    Ranks without elements are left out. Tensors with the same cut share a plan.
    """

    def __init__(self, cut: AxisCut, world_size: int, rank: int) -> None:
        old_numel = math.prod(cut.shape)
        new_numel = math.prod(cut.new_shape)
        old_partition = partition_numel(old_numel, world_size)
        self.cut = cut
        self.owned = owned_range(old_numel, world_size, rank)  # before the cut
        self.new_partition = partition_numel(new_numel, world_size)  # padding included
        # The borders of the old and of the new shards, counted in kept elements: (world_size + 1,) each.
        borders = torch.arange(world_size + 1)
        old_borders = (borders * old_partition).clamp(max=old_numel)
        old = cut.kept_before(old_borders)
        new = (borders * self.new_partition).clamp(max=new_numel)
        sent = overlap(old[rank], old[rank + 1], new[:-1], new[1:])
        received = overlap(new[rank], new[rank + 1], old[:-1], old[1:])
        self.send = _nonzero(sent)
        self.receive = _nonzero(received)

    def take(self, shard: Tensor) -> Tensor:
        """Returns the kept elements of this rank's old shard, in flat order: (sum(send),). Never reads padding."""
        start, end = self.owned
        axis = self.cut.axis
        columns = self.cut.columns
        position = start
        parts: list[Tensor] = []
        # Blocks of whole rows. The shard may begin and end inside a row, which is then a block of its own.
        while position < end:
            row, column = divmod(position, columns)
            rows = max(1, (end - position) // columns) if column == 0 else 1
            width = min(columns - column, end - position)
            first, count = (row, rows) if axis == 0 else (column, width)
            block = shard[position - start :][: rows * width].view(rows, width)
            kept = kept_within(self.cut.keep, first, first + count, shard.device)
            parts.append(block.index_select(axis, kept).reshape(-1))
            position += rows * width
        return torch.cat(parts) if len(parts) > 1 else (*parts, shard[:0])[0]


@lru_cache(64)  # tensors of a layer share it
def kept_within(keep: Tensor, first: int, end: int, device: torch.device) -> Tensor:
    """Returns the kept indices in [first, end), counted from `first`, on a device."""
    start, stop = map(int, torch.searchsorted(keep, torch.tensor([first, end])))
    return to_device(keep[start:stop] - first, device)


def _nonzero(counts: Tensor) -> dict[int, int]:
    numbers: list[int] = cast(Any, counts).tolist()
    return {rank: count for rank, count in enumerate(numbers) if count}
