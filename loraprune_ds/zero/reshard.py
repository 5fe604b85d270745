"""Carries out a cut on flat shards. What has the same dtype in a layer takes one all-to-all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import AxisCut, ReshardPlan


@dataclass(frozen=True)
class Item:
    """Holds a flat shard (padding allowed) and the cut of the tensor it belongs to."""

    shard: Tensor
    cut: AxisCut


@torch.no_grad()
def reshard(items: list[Item], comm: Communicator) -> list[Tensor]:
    """Exchanges the shards of all items for new, padded ones. Collective: one all-to-all.

    Peak memory beyond the old shards is what leaves, what arrives and the new shards. Each is at most as large as the
    old ones.

    Raises:
        ValueError: the items differ in dtype or device. One buffer would convert them without a word.
    """
    if not items:
        return []
    if len({(item.shard.dtype, item.shard.device) for item in items}) > 1:
        raise ValueError("reshard takes shards of one dtype on one device")
    plans = [ReshardPlan(item.cut, comm.world_size, comm.rank) for item in items]
    outgoing = _by_destination([plan.take(item.shard) for plan, item in zip(plans, items, strict=True)], plans)
    send = [sum(plan.send[r] for plan in plans) for r in range(comm.world_size)]
    receive = [sum(plan.receive[r] for plan in plans) for r in range(comm.world_size)]
    incoming = comm.all_to_all(outgoing, send, receive)
    del outgoing
    return _by_item(incoming, plans)


def reshard_each_dtype(items: list[Item], comm: Communicator) -> list[Tensor]:
    """Reshards items of several dtypes, in their order. Collective: one all-to-all per dtype."""
    new: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(item.shard.dtype for item in items):
        same = [i for i, item in enumerate(items) if item.shard.dtype == dtype]
        new |= dict(zip(same, reshard([items[i] for i in same], comm), strict=True))
    return [new[i] for i in range(len(items))]


def _by_destination(kept: list[Tensor], plans: list[ReshardPlan]) -> Tensor:
    """Orders what every item keeps by destination rank, then by item, in one buffer."""
    split = [shard.split(plan.send) for shard, plan in zip(kept, plans, strict=True)]
    return torch.cat([parts[rank] for rank in range(len(plans[0].send)) for parts in split])


def _by_item(incoming: Tensor, plans: list[ReshardPlan]) -> list[Tensor]:
    """Fills the padded new shards from a buffer ordered by source rank, then by item."""
    shards = [incoming.new_zeros(plan.new_partition) for plan in plans]
    filled, position = [0] * len(plans), 0
    for source in range(len(plans[0].receive)):
        for i, plan in enumerate(plans):
            count = plan.receive[source]
            shards[i][filled[i] : filled[i] + count] = incoming[position : position + count]
            filled[i] += count
            position += count
    return shards
