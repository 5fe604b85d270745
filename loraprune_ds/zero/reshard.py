"""Carries out a cut on flat pieces: one all-to-all for everything of a layer that has the same dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import AxisCut, ReshardPlan


@dataclass(frozen=True)
class Item:
    """A flat piece (padding allowed) and the cut of the tensor it belongs to."""

    piece: Tensor
    cut: AxisCut


@torch.no_grad()
def reshard(items: list[Item], comm: Communicator) -> list[Tensor]:
    """New padded pieces of all items, which share a dtype and a device. Collective: one all-to-all.

    Peak memory beyond the old pieces: what leaves, what arrives and the new pieces, each at most as large as the old.
    """
    if not items:
        return []
    plans = [ReshardPlan(item.cut, comm.world_size, comm.rank) for item in items]
    outgoing = _by_destination([plan.take(item.piece) for plan, item in zip(plans, items, strict=True)], plans)
    send = [sum(plan.send[r] for plan in plans) for r in range(comm.world_size)]
    receive = [sum(plan.receive[r] for plan in plans) for r in range(comm.world_size)]
    incoming = comm.all_to_all(outgoing, send, receive)
    del outgoing
    return _by_item(incoming, plans)


def _by_destination(kept: list[Tensor], plans: list[ReshardPlan]) -> Tensor:
    """Per-item pieces in flat order -> one buffer ordered by destination rank, then by item."""
    split = [piece.split(plan.send) for piece, plan in zip(kept, plans, strict=True)]
    return torch.cat([parts[rank] for rank in range(len(plans[0].send)) for parts in split])


def _by_item(incoming: Tensor, plans: list[ReshardPlan]) -> list[Tensor]:
    """One buffer ordered by source rank, then by item -> padded new pieces."""
    pieces = [incoming.new_zeros(plan.new_partition) for plan in plans]
    filled, position = [0] * len(plans), 0
    for source in range(len(plans[0].receive)):
        for i, plan in enumerate(plans):
            count = plan.receive[source]
            pieces[i][filled[i] : filled[i] + count] = incoming[position : position + count]
            filled[i] += count
            position += count
    return pieces
