"""Names the engine, and reads the attributes that ZeRO-3 sets on a parameter. It needs no DeepSpeed."""

from torch import Tensor

from loraprune_ds.config_types import EngineName

NAME: EngineName = "zero3"


def is_sharded(parameter: Tensor) -> bool:
    """Returns whether ZeRO-3 holds the parameter."""
    return hasattr(parameter, "ds_tensor")


def held(parameter: Tensor) -> Tensor:
    """Returns what this rank holds of a parameter: its shard under ZeRO-3, otherwise all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of the full parameter, sharded or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
