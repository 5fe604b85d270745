"""Files and folders that appear whole or not at all, however the process that writes them ends."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from loraprune_ds.faults import fail_point

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without locks, as Lustre can be


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def whole_file(path: Path, *, lasting: bool) -> Iterator[Path]:
    """Yields a temporary path. What is written there replaces `path` in one go.

    Args:
        lasting: forces it to the disk. Without it a machine that dies may leave an old or an empty file.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")  # another process may write the same file
    yield temporary
    if lasting:
        flush(temporary)
    os.replace(temporary, path)
    if lasting:
        flush(path.parent)


def staging_of(target: Path, mark: str = "") -> Path:
    """Returns the dot-named sibling in which the folder `target` is built.

    Args:
        mark: tells it from the one of another process that may build the same folder.
    """
    return target.with_name(f".{target.name}{mark and '.'}{mark}.partial")


def begin(target: Path, mark: str = "") -> Path:
    """Makes the empty staging folder of `target`. Replaces what a crashed attempt left."""
    staging = staging_of(target, mark)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(target: Path, mark: str = "") -> None:
    """Gives a staging folder its name, and makes the name last. Its files must be flushed already."""
    staging = staging_of(target, mark)
    flush(staging)
    staging.rename(target)
    flush(target.parent)


def remove(folder: Path) -> None:
    """Removes a published folder. It loses its name first, so that nobody finds half of it.

    NFS keeps files that somebody still reads. They go with the next removal and are no reason to end a run.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)  # an earlier removal was killed halfway
    folder.rename(doomed)
    fail_point("save.remove_renamed")
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Removes what killed writes and removals have left in `root`."""
    for leftover in (*root.glob(".*.removed"), *root.glob(".*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in root.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def user_cache() -> Path:
    """Returns the base directory of the XDG specification, which says to ignore a relative value."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Has `make` fill a new folder, which then appears as `folder`.

    Several processes of a node may call it. One makes the folder, the others wait and find it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # Another node that shares the file system was faster, and its folder is the same.


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, however it ends
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise  # without a lock every process makes its own, and the first one's is taken
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # a waiting process finds the folder, or makes another: both are good
