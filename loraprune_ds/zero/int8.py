"""Scales that a rank needs to read its shard of an int8 weight. A few of them lie in the shards of its neighbours."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.model.frozen import Int8, Matrix
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import overlap, owned_range
from loraprune_ds.zero.params import owned_flat


def decode_int8(form: Int8, scale: Any, shape: Matrix, comm: Communicator) -> Callable[[Tensor, int], Tensor]:
    """Returns what makes rows of a weight of those that this rank holds (`OwnedShard.decode`). Collective.

    Args:
        scale: the parameter with all scales, sharded.
        shape: of the weight.
    """
    plan, columns = ScalePlan(form, shape, comm.world_size), form.scale_shape(shape)[1]
    flat, start = owned_flat(scale, comm.world_size, comm.rank)
    parts = [flat[max(0, low - start) : max(0, high - start)] for low, high in plan.needed.tolist()]
    send, receive = plan.sent[comm.rank].tolist(), plan.sent[:, comm.rank].tolist()
    scales = comm.all_to_all(torch.cat(parts).to(comm.device), send, receive).view(-1, columns)
    return partial(_decode, form, scales, int(plan.needed[comm.rank, 0]) // columns)


class ScalePlan:
    """Says which scales of a weight each rank needs, and who has them.

    Attributes:
        needed: (world_size, 2) start and end of the flat scales for each rank's shard of the weight, in whole rows.
        sent: (world_size, world_size) scales that a rank (row) has and another (column) needs.
    """

    def __init__(self, form: Int8, shape: Matrix, world_size: int) -> None:
        rows, columns = form.scale_shape(shape)
        ranks = range(world_size)
        bands = [form.bands(shape, *owned_range(shape[0] * shape[1], world_size, rank)) for rank in ranks]
        self.needed = torch.tensor([[band.start * columns, band.stop * columns] for band in bands])
        owned = torch.tensor([owned_range(rows * columns, world_size, rank) for rank in ranks])
        self.sent = overlap(owned[:, None, 0], owned[:, None, 1], self.needed[None, :, 0], self.needed[None, :, 1])


def _decode(form: Int8, scales: Tensor, first_band: int, rows: Tensor, first: int) -> Tensor:
    return form.decode(rows, first, scales, first_band).float()
