"""Values for each kind of groups of a decoder layer. The family says which kinds there are (family.py)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Self, TypeVar

from torch import Tensor

from loraprune_ds.model.family_row import Kind

T = TypeVar("T")


class PerKind(Mapping[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. Never changes."""

    def __init__(self, values: Mapping[Kind, T] | Iterable[tuple[Kind, T]] = (), **named: T) -> None:
        self._values: dict[Kind, T] = dict(values, **named)

    def __getitem__(self, kind: Kind) -> T:
        return self._values[kind]

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values})"


class LayerShape(PerKind[int]):
    """Holds the counts of groups of one decoder layer, which pruning changes. 0 of a kind that this layer lacks."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of which the layer has groups. They tell what it holds."""
        return frozenset(kind for kind, count in self.items() if count)


class LayerTensors(PerKind[Tensor]):
    """Holds one value for every group of a decoder layer: (groups,) for each kind."""

    def select(self, keep: "LayerKeep") -> Self:
        """Returns the values of the groups that stay."""
        return type(self)((kind, values[keep[kind]]) for kind, values in self.items())


class LayerKeep(LayerTensors):
    """Names the groups that stay in one decoder layer: ascending int64 indices into its current groups."""

    @property
    def shape(self) -> LayerShape:
        """The layer's shape after the cut."""
        return LayerShape((kind, len(groups)) for kind, groups in self.items())
