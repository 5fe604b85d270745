"""Names the engine, and reads the attributes that ZeRO-3 sets on a parameter. It needs no DeepSpeed."""

from typing import Any

from torch import Size, Tensor, nn

from loraprune_ds.config_types import EngineName
from loraprune_ds.model.groups import Shape
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.layout import Shards

NAME: EngineName = "zero3"


def is_sharded(parameter: Tensor) -> bool:
    """Returns whether ZeRO-3 holds the parameter."""
    return hasattr(parameter, "ds_tensor")


def join_rows(stacked: Tensor) -> tuple[Shape, nn.Parameter]:
    """Makes a frozen matrix of a sharded tensor with one more axis, in place. Its flat shard stays."""
    parameter: Any = stacked
    shape = parameter.ds_shape
    parameter.ds_shape = Size((shape[0] * shape[1], *shape[2:]))
    return shape, parameter.requires_grad_(False)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of the full parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class FlatShards(Shards):
    """The shards of ZeRO-3, which may begin and end inside a row."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm, comm)

    def held(self, tensor: Tensor) -> Tensor:
        return getattr(tensor, "ds_tensor", tensor)

    def full_shape(self, tensor: Tensor) -> tuple[int, ...]:
        return full_shape(tensor)

    def write(self, parameter: Any, part: Tensor) -> None:
        super().write(parameter, part)
        # The copy of hpZ has the old values. The next gather makes a new copy.
        parameter.ds_secondary_tensor = None
