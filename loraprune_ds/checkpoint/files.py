"""Names of a checkpoint's folders, which appear whole or not at all: built under a dot-name, checksummed, flushed to
disk, renamed once."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.faults import fail_point

MANIFEST = "manifest.json"
SCORES_FILE = "scores.safetensors"
CHUNK = 1 << 24


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def moments_file(layer: int) -> str:
    return f"moments-{layer:05d}.safetensors"


def numbered(root: Path, kind: str) -> list[int]:
    """Numbers of the published folders `{kind}-N`, ascending."""
    found = [path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*") if path.is_dir()]
    return sorted(int(number) for number in found if number.isdigit())


def staging_of(target: Path) -> Path:
    """The dot-named sibling in which `target` is built."""
    return target.with_name(f".{target.name}.partial")


def begin(target: Path) -> Path:
    """An empty staging folder; what a crashed attempt left is replaced."""
    staging = staging_of(target)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Flushes a written file to disk; its entry for the manifest."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    """Names every file with its checksum; returns the manifest's own checksum."""
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    seal(path)
    return sha256(path)


def publish(target: Path) -> None:
    """Gives a sealed staging folder its name, and makes the name last."""
    staging = staging_of(target)
    flush(staging)
    staging.rename(target)
    flush(target.parent)


def remove(folder: Path) -> None:
    """Removes a published folder; it loses its name first, so that nobody finds half of it.

    What stays of it (NFS keeps files that somebody still reads) goes with the next removal: no reason to end a run.
    """
    doomed = folder.with_name(f".{folder.name}.removed")
    if doomed.exists():
        shutil.rmtree(doomed)  # an earlier removal was killed halfway
    folder.rename(doomed)
    fail_point("save.remove_renamed")
    shutil.rmtree(doomed, ignore_errors=True)


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th file of a folder against its manifest, so that ranks can share the reading.

    Raises:
        UserError: the manifest or a file is missing or damaged; names it.
    """
    for i, (name, entry) in enumerate(sorted(read_manifest(folder).items())):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if i % parts == part and (path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
            raise UserError(f"{path} is damaged: its checksum differs from {MANIFEST}")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> sha256 and bytes.

    Raises:
        UserError: it is missing or not a manifest.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        return {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing or damaged") from None


def flush(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
