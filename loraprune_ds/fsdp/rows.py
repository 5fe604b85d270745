"""How FSDP2 lays the rows of a tensor over the ranks, and how they move. It needs no model.

Rows are indices along the first axis. Shard s holds the rows [s*P, (s+1)*P), with P = ceil(rows / shards). The last
shards may be short or empty. Hybrid sharding (HSDP) repeats all shards in several replicas.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from loraprune_ds.model.groups import Slice
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import (
    AxisCut,
    ReshardPlan,
    kept_within,
    owned_range,
    pad,
    partition_numel,
    without_padding,
)

Shape = Sequence[int]


class RowShards:
    """The ranks that hold a model by rows.

    Attributes:
        shards: the ranks of this replica, which hold the model together.
        replicas: the ranks that hold the same rows as this one. None without HSDP.
        replica: the number of this rank's replica.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Takes the mesh of the ranks: (shards,), or under HSDP (replicas, shards)."""
        self.shards = Communicator(mesh.get_group(mesh.ndim - 1), device)
        self.replicas = Communicator(mesh.get_group(0), device) if mesh.ndim > 1 else None
        self.replica = 0 if self.replicas is None else self.replicas.rank
        self._ranks = mesh.mesh.view(-1, self.shards.world_size)

    @property
    def replica_count(self) -> int:
        return 1 if self.replicas is None else self.replicas.world_size

    def norm(self, norms: Sequence[float]) -> float:
        """Returns the norm of full tensors. `norms` are of the rows of each rank of the whole job."""
        replica: list[int] = self._ranks[0].tolist()
        return math.hypot(*(norms[rank] for rank in replica))

    def place(self, rank: int) -> tuple[int, int]:
        """Returns the numbers of replica and shard of a rank of the whole job."""
        replica, shard = (self._ranks == rank).nonzero()[0].tolist()
        return replica, shard

    def owned_flat(self, shape: Shape) -> tuple[int, int]:
        """Returns the flat elements [start, end) of this rank's rows of a tensor of `shape`."""
        start, end = owned_range(shape[0], self.shards.world_size, self.shards.rank)
        columns = math.prod(shape[1:])
        return start * columns, end * columns

    def padded(self, local: Tensor, shape: Shape) -> Tensor:
        """Returns this rank's rows of a tensor of `shape`, flat, on the device, as many as the first shard has."""
        numel = partition_numel(shape[0], self.shards.world_size) * math.prod(shape[1:])
        return pad(local.detach().to(self.shards.device).reshape(-1), numel)

    def collect(self, local: Tensor, shape: Shape, owner: int) -> Tensor | None:
        """Returns the full tensor on the rank `owner` of the whole job. None elsewhere."""
        replica, shard = self.place(owner)
        if replica != self.replica:
            return None
        gathered = self.shards.gather_to(shard, self.padded(local, shape))
        return None if gathered is None else without_padding(gathered, shape)

    def overwrite(self, local: Tensor, shape: Shape, owner: int, full: Tensor | None) -> None:
        """Overwrites this rank's rows, in every replica, by the rows of `full` on rank `owner`."""
        replica, shard = self.place(owner)
        rows = torch.empty_like(self.padded(local, shape))
        if replica == self.replica:
            self.shards.scatter_from(shard, None if full is None else full.reshape(-1), rows)
        if self.replicas is not None:
            self.replicas.broadcast_from(replica, rows)
        local.copy_(rows[: local.numel()].view_as(local))

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
