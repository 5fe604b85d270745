"""The names of a checkpoint's folders and files, and the manifest with the files' checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.whole import flush

# Of all that a run or a callback writes to go on from. What this format wrote resumes in every later version.
FORMAT = 5
MANIFEST = "manifest.json"
SCORES_FILE = "scores.safetensors"
MOMENTS_FILES = "moments-*.safetensors"  # one for each layer that has some
CHUNK = 1 << 24


class CheckpointMismatch(UserError):
    """Tells of a whole checkpoint that this start cannot use.

    Unlike a damaged one it is not passed over. A run begun instead would remove it at its first save.
    """


def check_format(found: object, path: Path) -> None:
    """Checks the format that a file names.

    Raises:
        CheckpointMismatch: this version cannot read it. The line names the file.
    """
    if found != FORMAT:
        raise CheckpointMismatch(
            f"{path} has format {found}; this version of loraprune_ds reads format {FORMAT}: "
            "finish the run with the version that began it, or start it again in another folder"
        )


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def layer_file(layer: int) -> str:
    return f"layer-{layer:05d}.safetensors"


def moments_file(layer: int) -> str:
    return f"moments-{layer:05d}.safetensors"


def numbered(root: Path, kind: str) -> list[int]:
    """Lists the numbers of the published folders `{kind}-N`, ascending."""
    found = [path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*") if path.is_dir()]
    return sorted(int(number) for number in found if number.isdigit())


def sha256(path: Path) -> str:
    """Returns the checksum of a file, a chunk at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Flushes a written file to the disk and returns its entry for the manifest."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    """Names every file with its checksum. Returns the manifest's own checksum."""
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    seal(path)
    return sha256(path)


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th file of a folder against its manifest, so that ranks can share the reading.

    Raises:
        UserError: the manifest or a file is missing or damaged. The message names it.
    """
    for i, (name, entry) in enumerate(sorted(read_manifest(folder).items())):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if i % parts == part and (path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
            raise UserError(f"{path} is damaged: its checksum differs from {MANIFEST}")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns sha256 and bytes by file name.

    Raises:
        UserError: it is missing or not a manifest.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        return {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing or damaged") from None
