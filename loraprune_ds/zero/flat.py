"""The pure geometry of ZeRO-3's flat shards, and of a cut on them. No communication, no DeepSpeed.

ZeRO-3 views a tensor as one row-major flat vector of N elements. Rank r owns the shard [r*P, (r+1)*P), with
P = ceil(N / world_size). The last shards are padded and may be empty.

Removing rows or columns keeps the order of what stays. So the kept elements of a shard [s, e) are again contiguous.
They are [kept_before(s), kept_before(e)) of the smaller tensor. So every rank knows what to send and receive. It needs
only shapes and the kept indices for that.
"""

# torch does not type all of its methods.
# pyright: reportUnknownMemberType=false

import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

GATHERED_NUMEL = 1 << 23  # elements of LoRA's factors and gradients that are gathered at once: 32 MiB, or one layer's


def partition_numel(numel: int, world_size: int) -> int:
    """Returns the elements of one rank's shard, padding included: ceil(numel / world_size)."""
    return -(-numel // world_size)


def owned_range(numel: int, world_size: int, rank: int) -> tuple[int, int]:
    """Returns [start, end) of the elements that `rank` owns, without padding. start == end for an empty shard."""
    size = partition_numel(numel, world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def layer_owner(layer: int, world_size: int) -> int:
    """Returns the owner of a layer. It holds what is kept whole: moments, refits, files of a checkpoint."""
    return layer % world_size


def owner_rounds(layers: int, world_size: int) -> list[range]:
    """Returns rounds of `world_size` layers. A rank owns at most one of a round. So all can work at once."""
    return [range(first, min(first + world_size, layers)) for first in range(0, layers, world_size)]


def gather_rounds(sizes: list[int], most: int) -> list[range]:
    """Returns rounds of consecutive layers. A round has `most` elements, or one layer."""
    rounds, first, numel = list[range](), 0, 0
    for layer, size in enumerate(sizes):
        if layer > first and numel + size > most:
            rounds.append(range(first, layer))
            first, numel = layer, 0
        numel += size
    return [*rounds, range(first, len(sizes))]


@dataclass(frozen=True)
class AxisCut:
    """Names the rows (axis 0) or columns (axis 1) of a tensor that stay.

    Attributes:
        shape: the tensor's shape before the cut, one or two dimensions.
        axis: the axis that gets smaller. 0 for a vector.
        keep: (kept,) int64, ascending.
    """

    shape: tuple[int, ...]
    axis: int
    keep: Tensor

    @property
    def rows(self) -> int:
        """Before the cut."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Before the cut. A vector is one column."""
        return self.shape[1] if len(self.shape) == 2 else 1

    @property
    def new_shape(self) -> tuple[int, ...]:
        """After the cut."""
        shape = list(self.shape)
        shape[self.axis] = len(self.keep)
        return tuple(shape)

    @cached_property
    def counts(self) -> Tensor:
        """(size of the axis + 1,) int64: how many of `keep` lie before each row or column."""
        counts = torch.zeros(self.shape[self.axis] + 1, dtype=torch.int64)
        counts[self.keep + 1] = 1
        return counts.cumsum_(0)

    def kept_before(self, positions: Tensor) -> Tensor:
        """Counts the kept elements before each flat position (int64, same shape). O(1) per position."""
        counts = self.counts
        row, column = positions // self.columns, positions % self.columns
        if self.axis == 1:
            return row * len(self.keep) + counts[column]
        row_is_kept = counts[(row + 1).clamp(max=self.rows)] - counts[row]
        return counts[row] * self.columns + column * row_is_kept


class Owners:
    """Holds the borders of all old and new shards. Every rank's plan follows from them.

    Attributes:
        kept: (world_size + 1,) the kept elements before each old shard. These are old borders in the new flat order.
        new: (world_size + 1,) the start of each new shard.
        new_partition: elements of a new shard, padding included.
    """

    def __init__(self, cut: AxisCut, world_size: int) -> None:
        old_numel, new_numel = math.prod(cut.shape), math.prod(cut.new_shape)
        self.new_partition = partition_numel(new_numel, world_size)
        ranks = torch.arange(world_size + 1)
        self.kept = cut.kept_before((ranks * partition_numel(old_numel, world_size)).clamp(max=old_numel))
        self.new = (ranks * self.new_partition).clamp(max=new_numel)

    def sent_by(self, ranks: Tensor) -> Tensor:
        """Returns (ranks, world_size): the elements that each has for every rank, itself included."""
        start, end = self.kept[ranks, None], self.kept[ranks + 1, None]
        return overlap(start, end, self.new[None, :-1], self.new[None, 1:])

    def received_by(self, ranks: Tensor) -> Tensor:
        """Returns (ranks, world_size): the elements that each gets from every rank, itself included."""
        start, end = self.new[ranks, None], self.new[ranks + 1, None]
        return overlap(self.kept[None, :-1], self.kept[None, 1:], start, end)


def moved_elements(cut: AxisCut, world_size: int) -> Tensor:
    """Returns (world_size,): the elements that each rank must send. They stay, but another rank owns them now."""
    owners = Owners(cut, world_size)
    stays = overlap(owners.kept[:-1], owners.kept[1:], owners.new[:-1], owners.new[1:])
    return owners.kept.diff() - stays


class ReshardPlan:
    """Holds what one rank sends and receives when a sharded tensor is cut. Tensors that are cut alike share it.

    Attributes:
        send: elements for each rank that gets any, itself included, in the order of the ranks.
        receive: elements from each rank that has any, itself included, in the order of the ranks.
        old, new: (start, end) of the owned shard before and after, each in its own flat order.
        new_partition: elements of a new shard, padding included.
    """

    def __init__(self, cut: AxisCut, world_size: int, rank: int) -> None:
        owners, this = Owners(cut, world_size), torch.tensor([rank])
        self.cut = cut
        self.old = owned_range(math.prod(cut.shape), world_size, rank)
        self.new = owned_range(math.prod(cut.new_shape), world_size, rank)
        self.new_partition = owners.new_partition
        self.send = _by_rank(owners.sent_by(this)[0])
        self.receive = _by_rank(owners.received_by(this)[0])
        self.moved = sum(self.send.values()) - self.send.get(rank, 0)  # elements that change owner, leaving this rank
        self._keep = cut.keep  # on the device of the last shard

    def take(self, shard: Tensor) -> Tensor:
        """Returns the kept elements of this rank's old shard, in flat order: (sum(send),). Never reads padding."""
        start, end = self.old
        columns, position = self.cut.columns, start
        parts: list[Tensor] = []
        self._keep = self._keep.to(shard.device)
        while position < end:
            row, first = divmod(position, columns)
            rows = max(1, (end - position) // columns) if first == 0 else 1  # the shard may begin and end inside a row
            width = min(columns - first, end - position)
            kept = self._kept_within(row, row + rows) if self.cut.axis == 0 else self._kept_within(first, first + width)
            block = shard[position - start : position - start + rows * width].view(rows, width)
            parts.append(block.index_select(self.cut.axis, kept).reshape(-1))
            position += rows * width
        return torch.cat(parts) if parts else shard[:0]

    def _kept_within(self, first: int, end: int) -> Tensor:
        """Returns the kept of the rows (or columns) [first, end), counted from `first`."""
        counts = self.cut.counts
        return self._keep[int(counts[first]) : int(counts[end])] - first


def _by_rank(counts: Tensor) -> dict[int, int]:
    numbers = cast(list[int], counts.tolist())
    return {rank: count for rank, count in enumerate(numbers) if count}


def overlap(start_a: Tensor, end_a: Tensor, start_b: Tensor, end_b: Tensor) -> Tensor:
    """Counts the elements that two ranges share. Broadcasts."""
    return (torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)).clamp(min=0)
