"""A rank without others."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def rank_of(
    world_size: int, rank: int, all_reduce: Callable[[Tensor], Tensor] = lambda values: values
) -> Any:
    """Stands for a Communicator."""
    return SimpleNamespace(
        device=torch.device("cpu"), rank=rank, world_size=world_size, all_reduce=all_reduce
    )
