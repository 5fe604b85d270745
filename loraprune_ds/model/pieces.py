"""The tensors on disk that one parameter consists of."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from typing import NamedTuple

from torch import Tensor

from loraprune_ds.model.family_row import Linear


class Pieces(NamedTuple):
    """Names the tensors on disk that one parameter consists of, one below the other. All are of `shape`.

    A single one may have three dimensions.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]

    def keep_rows(self, rows: Tensor) -> "Pieces":
        """Returns those that hold some rows of the parameter. A piece stays whole or goes."""
        return self._replace(names=tuple(self.names[i] for i in (rows // self.shape[0]).unique().tolist()))


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
