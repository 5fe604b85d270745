"""How a library lays tensors over the ranks: the part that each holds, and how parts move.

What a rank holds is not what it scores: of what several ranks hold each scores another piece.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range, pad, partition_numel, without_padding

Shape = Sequence[int]
# (start, end) -> flat elements [start, end) of a full tensor
ReadFlat = Callable[[int, int], Tensor]


class Layout(ABC):
    """Knows the part of a tensor that this rank holds, and moves parts. Unless a method says so, it is not collective.

    Attributes:
        comm: all ranks of the job.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def held(self, tensor: Tensor) -> Tensor:
        """Returns this rank's part of a tensor, by default all of it. A view."""
        return tensor

    def full_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Returns the shape of a tensor over all ranks."""
        return tuple(tensor.shape)

    @abstractmethod
    def part(self, shape: Shape) -> tuple[int, int]:
        """Returns the flat elements [start, end) that this rank holds of a tensor of `shape`, without padding."""

    @abstractmethod
    def gather(self, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns full tensors on every rank. Collective.

        Args:
            parts: what this rank holds of each, in one dtype.
            tensors: those with the shapes, such as the parameters of gradients.
        """

    @abstractmethod
    def collect(self, tensor: Tensor, owner: int, part: Tensor | None = None) -> Tensor | None:
        """Returns a full tensor on rank `owner`. None elsewhere. Collective.

        Args:
            part: what this rank holds of another tensor of that shape, such as a moment.
        """

    @abstractmethod
    def overwrite(self, parameter: Tensor, owner: int, full: Tensor | None) -> None:
        """Overwrites a parameter on all ranks by the tensor of rank `owner`, which is None elsewhere. Collective."""

    def write(self, parameter: Tensor, part: Tensor) -> None:
        """Overwrites what this rank holds by a flat part. Either may have padding."""
        held = self.held(parameter).view(-1)
        held[: len(part)].copy_(part[: len(held)])

    def fill(self, parameter: Tensor, read: ReadFlat) -> None:
        """Reads this rank's part of a parameter again."""
        self.write(parameter, read(*self.part(self.full_shape(parameter))))

    def norm(self, norms: Sequence[float]) -> float:
        """Returns the norm of full tensors from that of each rank's parts."""
        return norms[0]


class Whole(Layout):
    """Every rank holds all of a tensor."""

    def part(self, shape: Shape) -> tuple[int, int]:
        return 0, math.prod(shape)

    def gather(self, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def collect(self, tensor: Tensor, owner: int, part: Tensor | None = None) -> Tensor | None:
        if self.comm.rank != owner:
            return None
        return tensor.detach() if part is None else part.detach().view(tensor.shape)

    def overwrite(self, parameter: Tensor, owner: int, full: Tensor | None) -> None:
        if full is not None:
            parameter.copy_(full)
        self.comm.broadcast_from(owner, parameter.data)


class Shards(Layout):
    """Every rank holds flat elements [start, end) of a tensor. Parts have one size, the last ones with padding.

    Attributes:
        shards: the ranks that hold a tensor together.
        replicas: the ranks that hold the same parts as this one, if tensors are held several times.
    """

    def __init__(
        self, comm: Communicator, shards: Communicator, replicas: Communicator | None = None
    ) -> None:
        super().__init__(comm)
        self.shards = shards
        self.replicas = replicas
        self.replica = 0 if replicas is None else replicas.rank

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """Returns into how many blocks a tensor can be split, and the elements of each."""
        return math.prod(shape), 1

    def place(self, rank: int) -> tuple[int, int]:
        """Returns the numbers of replica and shard of a rank of the job."""
        return self.replica, rank

    def part(self, shape: Shape) -> tuple[int, int]:
        count, numel = self.blocks(shape)
        start, end = owned_range(count, self.shards.world_size, self.shards.rank)
        return start * numel, end * numel

    def padded_numel(self, shape: Shape) -> int:
        """Returns the elements of each rank's part of a tensor of `shape`, padding included."""
        count, numel = self.blocks(shape)
        return partition_numel(count, self.shards.world_size) * numel

    def padded(self, part: Tensor, shape: Shape) -> Tensor:
        """Returns a part, flat, padded and on the device. It may be offloaded to the host."""
        return pad(part.detach().to(self.comm.device).reshape(-1), self.padded_numel(shape))

    def gather(self, parts: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        shapes = list(map(self.full_shape, tensors))
        gathered = _gather(list(map(self.padded, parts, shapes)), self.shards)
        return list(map(without_padding, gathered, shapes))

    def collect(self, tensor: Tensor, owner: int, part: Tensor | None = None) -> Tensor | None:
        replica, shard = self.place(owner)
        if replica != self.replica:
            return None
        shape = self.full_shape(tensor)
        part = self.held(tensor) if part is None else part
        gathered = self.shards.gather_to(shard, self.padded(part, shape))
        return None if gathered is None else without_padding(gathered, shape)

    def overwrite(self, parameter: Tensor, owner: int, full: Tensor | None) -> None:
        replica, shard = self.place(owner)
        numel = self.padded_numel(self.full_shape(parameter))
        part = self.held(parameter).new_empty(numel, device=self.comm.device)
        if replica == self.replica:
            self.shards.scatter_from(shard, None if full is None else full.reshape(-1), part)
        if self.replicas is not None:
            self.replicas.broadcast_from(replica, part)
        self.write(parameter, part)

    def norm(self, norms: Sequence[float]) -> float:
        return math.hypot(*norms)


def _gather(parts: list[Tensor], comm: Communicator) -> list[Tensor]:
    """Gathers the flat parts of several tensors by one all-gather. Returns (world_size, part) of each.

    Parts of one size travel side by side, so one copy brings together the parts of each of their tensors.
    """
    by_size: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        by_size.setdefault(len(part), []).append(i)
    order = [i for places in by_size.values() for i in places]
    gathered = comm.all_gather(torch.cat([parts[i] for i in order]))
    tensors: list[Tensor] = []
    start = 0
    for size, places in by_size.items():
        of_size = gathered.narrow(1, start, size * len(places))
        start += size * len(places)
        tensors += of_size.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
    return [tensor for _, tensor in sorted(zip(order, tensors, strict=True), key=itemgetter(0))]
