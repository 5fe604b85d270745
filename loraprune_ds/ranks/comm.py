"""The collectives of pruning, with a count of sent bytes, and how ranks agree on values and errors.

DeepSpeed makes the gathers of a training step.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from loraprune_ds.errors import UserError, failed_read
from loraprune_ds.files import writes_into
from loraprune_ds.ranks.device import current_device
from loraprune_ds.ranks.flat import pad

T = TypeVar("T")
PATIENCE = timedelta(days=7)


def stop_ranks() -> None:
    """Leaves the process group, if any. This joins gloo's threads before the interpreter exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Communicator:
    """Runs collectives over the ranks that train one model, or a group of them. Counts the bytes that this rank sends.

    Without a process group there is one rank. The number of a rank is that in the group.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, device: torch.device | None = None
    ) -> None:
        self.group = group
        self.device = device or current_device()
        joined = dist.is_available() and dist.is_initialized()
        self.world_size: int = dist.get_world_size(group) if joined else 1
        self.rank: int = dist.get_rank(group) if joined else 0
        self.bytes_sent = 0

    def all_gather(self, local: Tensor) -> Tensor:
        """Gathers (n,) from every rank. Returns (world_size, n)."""
        if self.world_size == 1:
            return local[None]
        gathered = torch.empty(
            self.world_size * local.numel(), dtype=local.dtype, device=local.device
        )
        # its name before torch 2.13
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, local.contiguous(), group=self.group)
        self.bytes_sent += local.nbytes * (self.world_size - 1)
        return gathered.view(self.world_size, -1)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
            self.bytes_sent += values.nbytes
        return values

    def all_to_all(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Sends flat elements ordered by destination, `send[rank]` to each rank. Returns them ordered by source."""
        incoming = torch.empty(sum(receive), dtype=outgoing.dtype, device=outgoing.device)
        if self.world_size == 1:
            return incoming.copy_(outgoing)
        dist.all_to_all_single(incoming, outgoing, receive, send, group=self.group)
        self.bytes_sent += (outgoing.numel() - send[self.rank]) * outgoing.element_size()
        return incoming

    def gather_to(self, owner: int, local: Tensor) -> Tensor | None:
        """Gathers (n,) from every rank. Returns (world_size, n) on `owner` only."""
        if self.world_size == 1:
            return local[None]
        if self.rank == owner:
            gathered = [torch.empty_like(local) for _ in range(self.world_size)]
            dist.gather(local.contiguous(), gathered, group=self.group, group_dst=owner)
            return torch.stack(gathered)
        dist.gather(local.contiguous(), group=self.group, group_dst=owner)
        self.bytes_sent += local.nbytes
        return None

    def reduce_to(self, owner: int, values: Tensor) -> Tensor | None:
        """Sums over ranks, on `owner` only. Overwrites `values`."""
        if self.world_size > 1:
            dist.reduce(values, group=self.group, group_dst=owner)
        if self.rank == owner:
            return values
        self.bytes_sent += values.nbytes
        return None

    def broadcast_from(self, owner: int, tensor: Tensor) -> None:
        """Overwrites the tensor of every rank by the tensor of `owner`."""
        if self.world_size > 1:
            dist.broadcast(tensor, group=self.group, group_src=owner)
        if self.rank == owner:
            self.bytes_sent += tensor.nbytes * (self.world_size - 1)

    def scatter_from(self, owner: int, flat: Tensor | None, shard: Tensor) -> None:
        """Fills the `shard` of every rank from a flat tensor on `owner`. Padding becomes zero."""
        if flat is None:
            dist.scatter(shard, group=self.group, group_src=owner)
            return
        padded = pad(flat, len(shard) * self.world_size)
        if self.world_size == 1:
            shard.copy_(padded)
            return
        dist.scatter(shard, list(padded.split(len(shard))), group=self.group, group_src=owner)
        self.bytes_sent += shard.nbytes * (self.world_size - 1)

    def gather_objects(self, value: T) -> list[T]:
        """Gathers a small picklable value from every rank, in rank order."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_rank_0(self, value: T) -> T:
        """Returns the value of rank 0 on every rank. Collective."""
        return self.gather_objects(value)[0]

    def differing_rank(self, value: object) -> int | None:
        """Returns the first rank whose value differs from rank 0's. None if all ranks have the same. Collective."""
        values = self.gather_objects(value)
        for rank, its_value in enumerate(values):
            if its_value != values[0]:
                return rank
        return None

    def draw_mark(self) -> str:
        """Returns eight random hexadecimal digits, the same on all ranks. Collective."""
        return self.from_rank_0(uuid4().hex[:8])

    def all_or_raise(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank. If it fails on some, all raise the error of the lowest of these.

        Ranks agree on an error by this call. Otherwise a rank with bad input would leave, and the others would wait for
        it in the next collective.

        Raises:
            UserError: raised by `action`, or in place of its OSError, which counts as an error of input unless the
                disk is full or fails. The error of another rank names that rank.
        """
        result = None
        own_error = None
        try:
            result = action()
        except UserError as caught:
            own_error = caught
        except OSError as caught:
            own_error = failed_read(caught)
        for rank, error in enumerate(self.gather_objects(own_error)):
            if error is not None:
                raise error if rank == 0 else type(error)(f"rank {rank}: {error}")
        return cast(T, result)

    def on_rank_0(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on rank 0 alone and waits for it. Returns None elsewhere. Raises like `all_or_raise`."""
        return self.all_or_raise(lambda: action() if self.rank == 0 else None)

    def write_on_rank_0(self, path: Path, write: Callable[[], T]) -> T | None:
        """Writes a file or folder like `on_rank_0`. Raises RunError on all ranks if it cannot be written."""

        def write_or_fail() -> T:
            with writes_into(path):
                return write()

        return self.on_rank_0(write_or_fail)

    def ranks_per_node(self) -> int:
        """Counts the ranks on the node with the most ranks. Collective."""
        return max(Counter(self.gather_objects(socket.gethostname())).values())

    @contextmanager
    def patient(self) -> Iterator["Communicator"]:
        """Yields the same ranks with a time limit of days, for a download or conversion on one of them. Collective."""
        if self.world_size == 1:
            yield self
            return
        group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield Communicator(group)
        finally:
            torch.distributed.destroy_process_group(group)

    def first_per_node(self, action: Callable[[], T]) -> T:
        """Runs `action` on one rank of each node, which may download or convert, then on the others. Collective."""
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        with self.patient() as waiting:
            of_first = waiting.all_or_raise(lambda: action() if is_first else None)
            return waiting.all_or_raise(lambda: cast(T, of_first) if is_first else action())

    def warm_up(self) -> None:
        """Runs the collectives of a step, a cut and a save once, on a few bytes. Collective."""
        # NCCL connects two ranks at their first exchange, and allocates gigabytes of buffers outside torch's pool
        # (NVIDIA/nccl #1685). So a lack of memory or a broken network shows before the run, not at the first cut.
        ones = torch.ones(self.world_size, device=self.device)
        bytes_before = self.bytes_sent
        self.all_reduce(ones.clone())
        self.all_gather(ones)
        if self.world_size > 1:  # DeepSpeed makes these
            dist.reduce_scatter_tensor(ones[:1].clone(), ones, group=self.group)
        self.all_to_all(ones, [1] * self.world_size, [1] * self.world_size)
        self.gather_to(0, ones)
        self.bytes_sent = bytes_before

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)


class LocalWrites:
    """Makes this rank's writes into `folder` between collectives. After a failure it stops, until `agree` raises."""

    def __init__(self, comm: Communicator, folder: Path) -> None:
        self._comm = comm
        self._folder = folder
        self._error: UserError | None = None

    def do(self, write: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            with writes_into(self._folder):
                write()
        except UserError as error:
            self._error = error

    def do_on_rank_0(self, write: Callable[[], object]) -> None:
        """Makes a write on rank 0 alone. Then raises like `agree`. Collective."""
        if self._comm.rank == 0:
            self.do(write)
        self.agree()

    def agree(self) -> None:
        """Raises the same error on all ranks if a write failed on one of them. RunError for a full disk. Collective."""
        self._comm.all_or_raise(self._raise_own_error)

    def _raise_own_error(self) -> None:
        if self._error is not None:
            raise self._error
