"""Scales that a rank needs to read its shard of an int8 weight. A few of them lie in the shards of its neighbours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.model.frozen import Int8, Matrix
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import owned_range
from loraprune_ds.zero.params import owned_flat


def decode_int8(form: Int8, scale: Any, shape: Matrix, comm: Communicator) -> Callable[[Tensor, int], Tensor]:
    """Returns what makes rows of a weight of those that this rank holds (`OwnedShard.decode`). Collective.

    Args:
        scale: the parameter with all scales, sharded.
        shape: of the weight.
    """
    needed = [needed_scales(form, shape, comm.world_size, rank) for rank in range(comm.world_size)]
    flat, start = owned_flat(scale)
    send = [overlap(whose, range(start, start + len(flat))) for whose in needed]
    owned = [range(*owned_range(scale.ds_numel, comm.world_size, rank)) for rank in range(comm.world_size)]
    receive = [len(overlap(needed[comm.rank], whose)) for whose in owned]
    outgoing = torch.cat([flat[part.start - start : part.stop - start] for part in send]).to(comm.device)
    columns = form.scale_shape(shape)[1]
    scales = comm.all_to_all(outgoing, [len(part) for part in send], receive).view(-1, columns)
    return partial(_decode, form, scales, needed[comm.rank].start // columns)


def needed_scales(form: Int8, shape: Matrix, world_size: int, rank: int) -> range:
    """Returns the flat scales that a rank needs for its shard of a weight, in whole rows."""
    bands = form.bands(shape, *owned_range(shape[0] * shape[1], world_size, rank))
    columns = form.scale_shape(shape)[1]
    return range(bands.start * columns, bands.stop * columns)


def overlap(first: range, second: range) -> range:
    """Returns what two ranges share."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def _decode(form: Int8, scales: Tensor, first_band: int, rows: Tensor, first: int) -> Tensor:
    return form.decode(rows, first, scales, first_band).float()
