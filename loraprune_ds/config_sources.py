"""Finds the files of a data source, and the format of a path alone in `data.path`."""

import json
from contextlib import suppress
from glob import glob, has_magic
from pathlib import Path

from loraprune_ds.config import DataConfig, DataSource
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject

EMBEDDED_CHATS = "embedded-chats"  # that SmolLM2-135M-Instruct wrote itself
CHATS_FILE = Path(__file__).with_name("train") / "data" / "embedded_chats.jsonl"
TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES
# The settings that name the text fields of a row. The fields of a conversation have fixed names.
FIELD_SETTINGS = {
    "text": ("text_field",),
    "instruction": ("prompt_field", "response_field", "input_field"),
    "seq2seq": ("source_field", "target_field"),
    "chat": (),
}
# the first form that a row has is used
CHAT_FIELDS = (("messages",), ("conversations",), ("prompt", "completion"))
FIRST_ROW = 2**24  # its most characters


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


def format_of(source: DataSource, data: JsonObject) -> object:
    """Tells the format of a path alone by its first file: by the suffix, or by the fields of the first row.

    Rows that fit none or several, and data sets of the hub, have the format of `data`.

    Raises:
        UserError: like `files_of`, or a row fits several formats and `data` has none of them.
    """
    if source.path == DataConfig.path:
        return "text"
    first = Path(source.path)
    if first.suffix not in TEXT_SUFFIXES:
        first = (files_of(source) or [first])[0]
    if first.suffix in TEXT_SUFFIXES:
        return "text"
    row = _first_fields(first)
    formats: set[str] = set()
    for name, settings in FIELD_SETTINGS.items():
        # an instruction may have no input
        fields = [data.get(key, getattr(DataSource, key)) for key in settings[:2]]
        if fields and all(field in row for field in fields):
            formats.add(name)
    if any(all(field in row for field in fields) for fields in CHAT_FIELDS):
        formats.add("chat")
    default = data.get("format")
    if default in formats or not formats:
        return default or DataSource.format
    require(
        len(formats) == 1,
        f"{source.section}: {source.path} has the fields of {' and '.join(sorted(formats))}; "
        "write {path: ..., format: ...}",
    )
    return formats.pop()


def _first_fields(path: Path) -> list[str]:
    """Reads the fields of the first row in a JSON file. The data's reader says what is wrong with a row."""
    with suppress(OSError, ValueError, RecursionError), path.open(encoding="utf-8-sig") as file:
        row, _ = json.JSONDecoder().raw_decode(file.read(FIRST_ROW).lstrip(" \t\r\n["))
        return list(row) if isinstance(row, dict) else []
    return []
