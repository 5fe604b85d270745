"""Files and folders that are complete or absent, even if the writing process is killed. JSON is always valid."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from pydantic_core import to_jsonable_python
from safetensors import SafetensorError

from loraprune_ds.errors import MAKE_ROOM, RunError, UserError, fail_point, one_line, require

MADE_BY = "loraprune_ds"
MANIFEST = "manifest.json"  # of a step's folders
STATE_FILE = "state.json"  # of a step
CARD_FILE = "README.md"  # of an exported model

JsonObject = dict[str, Any]  # such as a config.json, or the mapping of a YAML file
# from a file system without locks, such as some Lustre
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def writes_into(path: Path, kind: type[RunError] = RunError) -> Iterator[None]:
    """Reports a failed write of a file or folder, for example on a full disk, in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise kind(f"{error.filename or path} cannot be written: {reason}; {MAKE_ROOM}") from None
    except SafetensorError as error:  # its own error, without an errno
        raise kind(f"{path} cannot be written: {one_line(error)}; {MAKE_ROOM}") from None


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staging_of(target: Path, mark: str = "") -> Path:
    """Returns the hidden sibling in which the folder `target` is built. `mark` names the process that builds it."""
    suffix = f".{mark}" if mark else ""
    return target.with_name(f".{target.name}{suffix}.partial")


def begin_folder(target: Path, mark: str = "") -> Path:
    """Makes the empty staging folder of `target`. Replaces the folder of a crashed attempt."""
    staging = staging_of(target, mark)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish_folder(target: Path, mark: str = "") -> None:
    """Renames a staging folder to its target, durably. Its files must be flushed already."""
    staging = staging_of(target, mark)
    flush(staging)
    staging.rename(target)
    flush(target.parent)


def is_ours(folder: Path) -> bool:
    """Tells whether this package made a folder: a step has its own files, and a model a card that names the package."""
    if any((folder / name).is_file() for name in (MANIFEST, STATE_FILE)):
        return True
    card = folder / CARD_FILE
    return card.is_file() and MADE_BY in card.read_text(encoding="utf-8", errors="replace")


def check_removable(folder: Path) -> None:
    """Raises UserError unless this package made the folder, or it is empty."""
    require(
        is_ours(folder) or not any(folder.iterdir()),
        f"{folder} was not made by {MADE_BY}, so it is not replaced; move it, or take another output folder",
    )


def remove_folder(folder: Path) -> None:
    """Removes a published folder, if there is one. It is renamed first, so that no process finds half of it.

    Raises:
        UserError: this package did not make it.
    """
    if not folder.exists():
        return
    check_removable(folder)
    # NFS keeps files that are still being read. The next removal deletes them.
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)  # an earlier removal was killed halfway
    folder.rename(doomed)
    fail_point("save.remove_renamed")
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Removes the leftovers of killed processes in `root`."""
    for leftover in (*root.glob(".*.removed"), *root.glob(".*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in root.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def user_cache() -> Path:
    """Returns the base directory of the XDG specification, which ignores a relative value."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return configured if configured.is_absolute() else Path.home() / ".cache"


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Creates `folder` with the contents that `make` writes. One process does it, the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
            unfinished = Path(scratch) / "made"
            unfinished.mkdir()
            make(unfinished)
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                # Another node on the shared file system was faster, and made the same folder.


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise  # without a lock every process makes a folder, and the first one is used
        try:
            yield
        finally:
            # a waiting process finds the folder or makes another. Both are right
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def open_text(path: Path, key: str) -> Iterator[TextIO]:
    """Opens a UTF-8 file. Line ends of any kind become "\\n". Raises UserError, which names `key` and file."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"{key}: {path} is not UTF-8 text: {reason}") from None
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None


def read_text(path: Path, key: str) -> str:
    """Reads a file like `open_text`, which must not be blank."""
    with open_text(path, key) as file:
        text = file.read()
    require(text.strip(), f"{key}: {path} is empty")
    return text


def json_text(value: Any, **options: Any) -> str:
    """Returns a nested value, also of dataclasses, as JSON. NaN and infinities become null, because JSON has none."""
    return json.dumps(to_jsonable_python(value, inf_nan_mode="null"), **options) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replaces a file atomically. It is not flushed to the disk, because this may run on every step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # another process may write the same file
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text`, like `write_text`."""
    write_text(path, json_text(value, indent=2, ensure_ascii=False))


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice")
    return dict(pairs)


def read_json(path: Path, *, unique_keys: bool = False, missing_ok: bool = False) -> JsonObject:
    """Reads a JSON file that must hold one object. With `unique_keys`, a key given twice is an error.

    With `missing_ok`, a missing file counts as an empty object.

    Raises:
        UserError: the file is missing, unreadable or holds no object. The message names it.
    """
    if missing_ok and not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    require(isinstance(value, dict), f"{path} must hold a JSON object")
    return value


def file_identity(path: Path) -> object:
    """Returns a value that differs after the file has changed. The file is not read."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
