"""The rows or columns of a matrix that a cut leaves. Stacks of experts keep other ones in each expert."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from loraprune_ds.model.family_row import ChannelAxis, Kind, Lines
from loraprune_ds.model.per_kind import LayerKeep


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) that stay.

    Attributes:
        keep: (kept,) int64, ascending.
        blocks: equal blocks of rows, of which each keeps columns of its own: as many, or none and then no row either.
            `keep` counts the columns of the first block, then those of the second one, and so on.
    """

    axis: int
    keep: Tensor
    blocks: int = 1

    def of_block(self, block: int, size: int) -> Tensor:
        """Returns what stays of one of equal blocks, of so many rows (or columns)."""
        low, high = torch.searchsorted(self.keep, torch.tensor([block * size, (block + 1) * size])).tolist()
        return self.keep[low:high] - block * size

    def rows(self, rows: int, columns: int) -> Tensor:
        """Returns the rows that stay in part or whole, of a matrix (rows, columns)."""
        if self.axis == 0:
            return self.keep
        kept = (self.keep // columns).unique() if self.blocks > 1 else torch.arange(1)
        return group_indices(kept, rows // self.blocks)


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)


def channel_lines(channels: Tensor, size: int, lines: Lines) -> Tensor:
    """Returns the rows (or columns) of some channels of all experts, ascending.

    Args:
        channels: ascending. Those of each expert follow those of the one before.
        size: channels of an expert.
    """
    experts, inside = channels // size, channels % size
    sections = experts[:, None] * lines.sections + torch.arange(lines.sections)
    return group_indices((sections * size + inside[:, None]).flatten().sort().values, lines.together)


def stack_slice(counts: Mapping[Kind, int], keep: LayerKeep, rows: int, channels: ChannelAxis | None) -> Slice | None:
    """Returns what stays of a matrix (experts * rows, columns). None if nothing goes.

    Args:
        counts: of the layer, before the cut.
        channels: where it has those of its experts. None: it has none.
    """
    experts, size = counts["experts"], counts["expert_channels"]
    kept = keep.get("expert_channels")
    if channels and kept is not None and len(kept) < experts * size:
        lines = channel_lines(kept, size, channels.lines)
        return Slice(channels.axis, lines, experts if channels.axis == 1 else 1)
    kept = keep["experts"]
    return Slice(0, group_indices(kept, rows)) if len(kept) < experts else None


def along(channels: ChannelAxis | None, axis: Literal[0, 1]) -> ChannelAxis | None:
    """Returns `channels` where they lie along this axis. So B has them, or A."""
    return channels if channels and channels.axis == axis else None
