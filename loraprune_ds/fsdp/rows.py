"""How FSDP2 lays the rows of a tensor over the ranks, and how they move. It needs no model.

Rows are indices along the first axis. Shard s holds the rows [s*P, (s+1)*P), with P = ceil(rows / shards). The last
shards may be short or empty. Hybrid sharding (HSDP) repeats all shards in several replicas.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from loraprune_ds.model.groups import Slice
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import AxisCut, ReshardPlan, kept_within
from loraprune_ds.ranks.layout import Shape, Shards, Whole


class RowShards(Shards):
    """The rows that each rank holds. A tensor outside all units is whole."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Takes the mesh of the ranks: (shards,), or under HSDP (replicas, shards)."""
        shards = Communicator(mesh.get_group(mesh.ndim - 1), device)
        replicas = Communicator(mesh.get_group(0), device) if mesh.ndim > 1 else None
        super().__init__(Communicator(device=device), shards, replicas)
        self._ranks = mesh.mesh.view(-1, self.shards.world_size)

    @torch.no_grad()
    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def blocks(self, shape: Shape) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def place(self, rank: int) -> tuple[int, int]:
        replica, shard = (self._ranks == rank).nonzero()[0].tolist()
        return replica, shard

    def collect(self, tensor: Tensor, owner: int, part: Tensor | None = None) -> Tensor | None:
        if isinstance(tensor, DTensor):
            return super().collect(tensor, owner, part)
        return Whole(self.comm).collect(tensor, owner, part)

    def norm(self, norms: Sequence[float]) -> float:
        replica: list[int] = self._ranks[0].tolist()
        return super().norm([norms[rank] for rank in replica])

    def cut(self, local: Tensor, shape: Shape, kept: Slice) -> Tensor:
        """Returns this rank's rows of the smaller tensor. Only rows that change rank travel.

        Args:
            shape: of the full tensor before the cut.
        """
        if kept.axis:
            indices = kept_within(kept.keep, 0, shape[kept.axis], local.device)
            return local.index_select(kept.axis, indices)
        ranks = range(self.shards.world_size)
        # a row is one element of the plan
        plan = ReshardPlan(AxisCut((shape[0], 1), 0, kept.keep), len(ranks), self.shards.rank)
        mine = kept_within(kept.keep, *plan.owned, local.device)
        outgoing = local.index_select(0, mine).reshape(-1).to(self.shards.device)
        columns = math.prod(shape[1:])
        send = [columns * plan.send.get(rank, 0) for rank in ranks]
        receive = [columns * plan.receive.get(rank, 0) for rank in ranks]
        incoming = self.shards.all_to_all(outgoing, send, receive)
        return incoming.view(-1, *shape[1:]).to(local.device)
