"""Values for each kind of groups of a decoder layer. The family says which kinds there are (family.py)."""

from typing import Self, TypeVar

from torch import Tensor

from loraprune_ds.model.family_row import Kind

T = TypeVar("T")


class PerKind(dict[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. Must not change: it is hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class LayerShape(PerKind[int]):
    """Holds the counts of groups of one decoder layer, which pruning changes. 0 of a kind that this layer lacks."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of which the layer has groups."""
        return frozenset(kind for kind, count in self.items() if count)


class LayerTensors(PerKind[Tensor]):
    """Holds one value for every group of a decoder layer: (groups,) for each kind."""

    def select(self, keep: "LayerKeep") -> Self:
        return type(self)((kind, values[keep[kind]]) for kind, values in self.items())


class LayerKeep(LayerTensors):
    """Names the groups that stay in one decoder layer: ascending int64 indices into its current groups."""

    @property
    def shape(self) -> LayerShape:
        return LayerShape((kind, len(groups)) for kind, groups in self.items())
