"""Groups: the parts of a layer that leave as a unit, counted, scored and kept by kind.

heads        One key-value head with all the query heads that read it. Under MHA it is one head.
channels     One MLP channel.
delta        One key head of a gated delta net with its value heads. Layers with these have no attention.
experts      One expert of a mixture (experts.py).
cross_heads  One head of a decoder's attention to its encoder. Layers of the encoder have none.

A dense layer among sparse ones has heads and no experts. Its MLP is never cut. A layer of Mamba-2 alone has no groups.
"""

from typing import Self, TypeVar

import torch
from torch import Tensor

Kind = str
T = TypeVar("T")
# Settings that leave layers of one size.
EQUAL_LAYERS = "prune.ranking: uniform, prune.protected_first: 0 and prune.protected_last: 0"


class PerKind(dict[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. Must not change: it is hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class LayerCounts(PerKind[int]):
    """Holds the number of groups of each kind in one layer. 0 of a kind that this layer lacks."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of which the layer has groups."""
        return frozenset(kind for kind, count in self.items() if count)


class LayerTensors(PerKind[Tensor]):
    """Holds one value for every group of a layer: (groups,) for each kind."""

    def select(self, keep: "LayerKeep") -> Self:
        return type(self)((kind, values[keep[kind]]) for kind, values in self.items())


class LayerKeep(LayerTensors):
    """Names the groups that stay in one layer: ascending int64 indices into its current groups."""

    @property
    def counts(self) -> LayerCounts:
        return LayerCounts((kind, len(groups)) for kind, groups in self.items())


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)
