"""The tensors on disk that one parameter consists of."""

from typing import NamedTuple

from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.slices import Slice


class Pieces(NamedTuple):
    """Names the tensors on disk that one parameter consists of, one below the other. All are of `shape`.

    A single one may have three dimensions.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]

    def sliced(self, kept: Slice) -> tuple["Pieces", dict[str, Slice]]:
        """Returns the pieces of what stays of the parameter, and what stays of each that is not whole."""
        rows, columns = self.shape
        each = len(self.names) // kept.blocks  # in a block of columns
        own = dict[str, Slice]()
        for i, name in enumerate(self.names):
            stays = kept.of_block(i, rows) if kept.axis == 0 else kept.of_block(i // each, columns)
            if len(stays):
                own[name] = Slice(kept.axis, stays)
        shape = list(self.shape)
        shape[kept.axis] = len(next(iter(own.values())).keep)
        parts = own if tuple(shape) != self.shape else {}
        return Pieces(tuple(own), tuple(shape)), parts


def pieces_of(prefix: str, stack: Linear, experts: int, shape: tuple[int, ...]) -> Pieces:
    """Returns those of a stack of experts.

    Args:
        shape: of the stack.
    """
    rows, columns = shape
    if any("{}" in name for name in stack.stored):
        names = tuple(prefix + name.format(expert) for expert in range(experts) for name in stack.stored)
        return Pieces(names, (rows // len(names), columns))
    return Pieces(tuple(prefix + name for name in stack.stored), (experts, rows // experts, columns))
