"""The user's cache, where what was made once for a node is found again."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # a file system without them, as Lustre can be


def user_cache() -> Path:
    """The base directory the XDG specification names; a relative value is to be ignored."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Has `make` fill a new folder, which then appears as `folder`, whole or not at all.

    Of several processes of a node one makes it and the others wait; they find it there.

    Raises:
        OSError: the cache cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            _publish(made, folder)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # gone with the process, however it ends
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise  # without a lock every process makes its own, and the first one's is taken
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # who waits for it finds the folder, or makes it beside another: both are good


def _publish(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        # Another node that shares the file system was faster, and its folder is the same.
