"""The names of a checkpoint's folders and files, and the manifest with the files' checksums."""

import hashlib
import json
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.whole import flush

# Of everything that a run or a callback resumes from. Every later version reads this format.
FORMAT = 5
MANIFEST = "manifest.json"
SCORES_FILE = "scores.safetensors"


class CheckpointMismatch(UserError):
    """An undamaged checkpoint that this start cannot use, and that a run from step 0 would remove at its first save."""


def check_format(found: object, path: Path) -> None:
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
    numbers = [path.name.removeprefix(f"{kind}-") for path in root.glob(f"{kind}-*") if path.is_dir()]
    return sorted(int(number) for number in numbers if number.isdigit())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk and returns its entry for the manifest."""
    flush(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    flush(path)


def verify(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks every `parts`-th file of a folder against its manifest, so that ranks can share the reading."""
    for i, (name, entry) in enumerate(sorted(_read_manifest(folder).items())):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if i % parts == part and (path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
            raise UserError(f"{path} is damaged: its checksum differs from {MANIFEST}")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text())["files"]
        return {name: {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is missing or damaged") from None
