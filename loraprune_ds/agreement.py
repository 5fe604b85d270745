"""Lets ranks agree on values and on errors, so that none waits for another that has failed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

from safetensors import SafetensorError

from loraprune_ds.errors import RunError, UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes that work on one model: this one alone. `zero.comm.Communicator` connects several."""

    rank = 0
    world_size = 1
    device: Any = "cpu"  # of this rank, for torch

    def all_gather(self, local: "Tensor") -> "Tensor":
        """Gathers (n,) from every rank. Returns (world_size, n)."""
        return local[None]

    def all_reduce(self, values: "Tensor") -> "Tensor":
        """Sums over ranks, in place."""
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""

    def gather_objects(self, value: T) -> list[T]:
        """Gathers a small picklable value from every rank, in rank order."""
        return [value]

    def differing_rank(self, value: object) -> int | None:
        """Returns the first rank whose value differs from rank 0's. None if all ranks have the same. Collective."""
        values = self.gather_objects(value)
        return next((rank for rank, other in enumerate(values) if other != values[0]), None)

    def draw_mark(self) -> str:
        """Returns eight random hexadecimal digits, the same on all ranks. Collective."""
        return self.gather_objects(uuid4().hex[:8])[0]

    def all_or_raise(self, action: Callable[[], T]) -> T:
        """Runs `action` on every rank. If it fails on some, all raise the error of the lowest of these.

        Ranks agree on an error by this call. Otherwise a rank with bad input would leave, and the others would wait for
        it in the next collective.

        Raises:
            UserError: raised by `action`, or in place of its OSError. The error of another rank names that rank.
        """
        result, error = None, None
        try:
            result = action()
        except UserError as caught:
            error = caught
        except OSError as caught:
            error = UserError(one_line(caught))
        failed = [(rank, e) for rank, e in enumerate(self.gather_objects(error)) if e is not None]
        if failed:
            rank, first = failed[0]
            raise first if rank == 0 else type(first)(f"rank {rank}: {first}")
        return cast(T, result)

    def on_rank_0(self, action: Callable[[], T]) -> T | None:
        """Runs `action` on rank 0 alone and waits for it. Returns None elsewhere. Raises like `all_or_raise`."""
        return self.all_or_raise(lambda: action() if self.rank == 0 else None)


class LocalWrites:
    """Makes this rank's writes into `folder` between collectives. After a failure it stops, until `agree` raises."""

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._error: UserError | None = None

    def do(self, write: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            write()
        except UserError as error:
            self._error = error
        except (OSError, SafetensorError) as error:
            self._error = RunError(f"{self._folder} cannot be written: {one_line(error)}")

    def do_on_rank_0(self, write: Callable[[], object]) -> None:
        """Makes a write on rank 0 alone. Then raises like `agree`. Collective."""
        if self._ranks.rank == 0:
            self.do(write)
        self.agree()

    def agree(self) -> None:
        """Raises the same error on all ranks if a write failed on one of them. RunError for a full disk. Collective."""
        self._ranks.all_or_raise(self._raise_own_error)

    def _raise_own_error(self) -> None:
        if self._error is not None:
            raise self._error
