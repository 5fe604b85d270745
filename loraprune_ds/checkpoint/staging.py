"""A folder that all ranks fill at the same time, and that appears in one rename."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from loraprune_ds import whole
from loraprune_ds.checkpoint import layout
from loraprune_ds.faults import fail_point
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import empty_cache
from loraprune_ds.zero.write import LocalWrites


class Staging:
    """Builds one folder. Construction and `publish` are collective. Its files are removed if a `with` block fails."""

    def __init__(self, comm: Communicator, target: Path, kind: str) -> None:
        self._mark = comm.draw_mark()
        self.target, self.folder = target, whole.staging_of(target, self._mark)
        self._comm, self._kind = comm, kind
        self._writes = LocalWrites()
        self._sealed: dict[str, dict[str, Any]] = {}
        empty_cache()  # torch may have reserved the memory that NCCL needs for the gathers
        self._writes.do_on_rank_0(comm, self.folder, lambda: whole.begin(target, self._mark))

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._comm.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Writes one file on this rank and seals it here, because only the writer's fsync surely flushes its cache."""

        def write_and_seal() -> None:
            write(self.folder / name)
            self._sealed[name] = layout.seal(self.folder / name)

        self._writes.do(write_and_seal)

    def seal(self, names: Iterable[str]) -> None:
        """Seals files that this rank has written."""
        for name in names:
            self.write(name, lambda path: None)

    def publish(self) -> None:
        """Writes the manifest and renames the folder. If a write failed on some rank, all ranks raise RunError."""
        self._writes.agree(self._comm, self.folder)
        sealed = {name: entry for part in self._comm.gather_objects(self._sealed) for name, entry in part.items()}
        self._writes.do_on_rank_0(self._comm, self.folder, lambda: self._rename(sealed))

    def _rename(self, sealed: dict[str, dict[str, Any]]) -> None:
        layout.write_manifest(self.folder, sealed)
        if self.target.exists():
            whole.remove(self.target)
        fail_point(f"save.{self._kind}_before_rename")
        whole.publish(self.target, self._mark)
        fail_point(f"save.{self._kind}_after_rename")
