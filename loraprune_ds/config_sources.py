"""Finds the files of a data source."""

from glob import glob, has_magic
from pathlib import Path

from loraprune_ds.config import DataSource
from loraprune_ds.errors import require

EMBEDDED_CHATS = "embedded-chats"  # that SmolLM2-135M-Instruct wrote itself
CHATS_FILE = Path(__file__).with_name("train") / "data" / "embedded_chats.jsonl"
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = (".txt", *JSON_SUFFIXES)


def files_of(source: DataSource) -> list[Path] | None:
    """Finds the files of a source: a file, a glob, or all files of a folder, sorted. None: its path is not local.

    Raises:
        UserError: a path does not exist, or local files have `data_files` or a `revision`.
    """
    path = source.path
    key = f"{source.section}.path"
    local = CHATS_FILE if path == EMBEDDED_CHATS else Path(path).expanduser()
    if not (local.is_file() or local.is_dir() or has_magic(path)):
        is_path = local.suffix in SUFFIXES or local.is_absolute() or path.startswith((".", "~"))
        require(not is_path, f"{key}: {path} does not exist")
        return None
    refuse_hub_settings(source)
    if local.is_file():
        require(local.suffix in SUFFIXES, f"{key}: {path} must be one of {', '.join(SUFFIXES)}")
        return [local]
    paths = local.rglob("*") if local.is_dir() else map(Path, glob(str(local), recursive=True))
    files = sorted(file for file in paths if file.suffix in SUFFIXES and file.is_file())
    where = f"folder {path}" if local.is_dir() else path
    require(files, f"{key}: {where} matches no {', '.join(SUFFIXES)} file")
    return files


def refuse_hub_settings(source: DataSource) -> None:
    """Raises UserError if a source that is no data set of the hub has `data_files` or a `revision`."""
    for key in ("data_files", "revision"):
        require(
            getattr(source, key) is None,
            f"{source.section}.{key} has no effect on {source.path}; it is of a `datasets` data set",
        )
