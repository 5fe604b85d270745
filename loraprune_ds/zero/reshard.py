"""Carries out a cut on flat shards. What has the same dtype in a layer takes one all-to-all."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import ReshardPlan


@dataclass(frozen=True)
class Item:
    """Holds a flat shard (padding allowed) and the plan of the tensor it belongs to."""

    shard: Tensor
    plan: ReshardPlan


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
    plans = [item.plan for item in items]
    outgoing = _by_destination(items)
    send, receive = [0] * comm.world_size, [0] * comm.world_size
    for plan in plans:
        for counts, total in ((plan.send, send), (plan.receive, receive)):
            for rank, count in counts.items():
                total[rank] += count
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


def _by_destination(items: list[Item]) -> Tensor:
    """Orders what every item keeps by destination rank, then by item, in one buffer."""
    parts: list[tuple[int, Tensor]] = []
    for item in items:
        parts += zip(item.plan.send, item.plan.take(item.shard).split(list(item.plan.send.values())), strict=True)
    parts.sort(key=lambda part: part[0])  # which leaves the items of a rank in order
    return torch.cat([items[0].shard[:0], *(part for _, part in parts)])


def _by_item(incoming: Tensor, plans: list[ReshardPlan]) -> list[Tensor]:
    """Makes the padded new shards from a buffer ordered by source rank, then by item."""
    order = sorted((source, i) for i, plan in enumerate(plans) for source in plan.receive)
    arrived = incoming.split([plans[i].receive[source] for source, i in order])
    parts: list[list[Tensor]] = [[] for _ in plans]
    for (_, i), part in zip(order, arrived, strict=True):
        parts[i].append(part)
    return [
        torch.cat([*own, incoming.new_zeros(plan.new_partition - sum(plan.receive.values()))])
        for plan, own in zip(plans, parts, strict=True)
    ]
