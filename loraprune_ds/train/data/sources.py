"""Reads rows of text from files, from a `datasets` name, or from Python's own help, as `data.path` says."""

import json
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from loraprune_ds.config import DataConfig
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.model.embedded import embedded_text
from loraprune_ds.model.hub import EMBEDDED, HUB_ERRORS
from loraprune_ds.train.data.chat import chat_fields

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".json", ".jsonl")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES
TextRow = Mapping[str, Any]


class TextRows(Protocol):
    """Describes what a list of dictionaries and a `datasets.Dataset` have in common."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...
    def __getitem__(self, index: int, /) -> Any: ...


def read_rows(config: DataConfig) -> TextRows:
    """Reads all rows of `data.path`. Each has at least the fields that the config names. A text file is one row.

    Raises:
        UserError: nothing is there, a file is empty or not valid JSON (names file and line), or a field is unknown.
    """
    if config.path == EMBEDDED:
        if config.format != "text":
            raise UserError(f"data.format {config.format} needs a data.path; the embedded text is plain text")
        return [{config.text_field: document} for document in embedded_text()]
    files = local_files(config.path)
    if files is None:
        return _load_dataset(config)
    rows = [row for file in files for row in _read_rows_of_file(file, config)]
    _read_fields(config, {field for row in rows for field in row})
    return rows


def fetch_dataset(config: DataConfig) -> None:
    """Downloads a data set into the cache, if `data.path` is the name of one.

    Raises:
        UserError: the data set cannot be had, is empty, or lacks a field.
    """
    if config.path != EMBEDDED and local_files(config.path) is None:
        _load_dataset(config)


def local_files(path: str) -> list[Path] | None:
    """Finds the files that `data.path` names: a file, a glob, or all files of a folder, sorted.

    Returns:
        None if it is no local path.

    Raises:
        UserError: it looks like a path, but nothing is there.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in SUFFIXES:
            raise UserError(f"data.path: {path} must be one of {', '.join(SUFFIXES)}")
        return [local]
    if local.is_dir():
        return _readable(local.rglob("*"), f"data.path: folder {path}")
    if any(wildcard in path for wildcard in "*?["):
        return _readable(map(Path, glob(str(local), recursive=True)), f"data.path: {path}")
    if local.suffix in SUFFIXES or local.is_absolute() or path.startswith((".", "~")):
        raise UserError(f"data.path: {path} does not exist")
    return None


def read_text_file(path: Path) -> str:
    """Reads a text file that is not blank.

    Raises:
        UserError: it does not exist, is not UTF-8 or is blank.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _text_fields(config: DataConfig) -> dict[str, str]:
    """Maps the fields of text that a row must have to the keys of the config that name them."""
    if config.format == "chat":
        return {}
    if config.format == "text":
        return {config.text_field: "data.text_field"}
    fields = {config.prompt_field: "data.prompt_field", config.response_field: "data.response_field"}
    return fields if config.input_field is None else fields | {config.input_field: "data.input_field"}


def _readable(paths: Iterable[Path], where: str) -> list[Path]:
    files = sorted(path for path in paths if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{where} matches no {', '.join(SUFFIXES)} file")
    return files


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}")


def _read_rows_of_file(path: Path, config: DataConfig) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return _read_json_lines(path, config)
    text = read_text_file(path)
    if path.suffix == ".json":
        value = _parse_json(text, path, 1)
        if not isinstance(value, list) or not value:
            raise UserError(f"{path} must hold a list of objects (one object per line goes into a .jsonl file)")
        return [_as_row(item, f"{path}, item {i}", config) for i, item in enumerate(value)]
    if config.format != "text":
        raise UserError(f"data.format {config.format} needs .json or .jsonl files; {path} is plain text")
    return [{config.text_field: text}]


def _read_json_lines(path: Path, config: DataConfig) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
            rows = [
                _as_row(_parse_json(line, path, number), f"{path}, line {number}", config) for number, line in numbered
            ]
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}, column {error.colno}: not valid JSON: {error.msg}") from None


def _as_row(value: Any, where: str, config: DataConfig) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, got {type(value).__name__}")
    for field in _text_fields(config):
        if not isinstance(value.get(field), str | None):  # rows of real data have gaps
            raise UserError(f"{where}: field {field!r} must be text; got {value[field]!r:.80}")
    return value


def _read_fields(config: DataConfig, known: set[str]) -> list[str]:
    """Returns the fields that are read, of those that are known."""
    if config.format == "chat":
        return chat_fields(known, config.path)
    fields = _text_fields(config)
    for field, key in fields.items():
        if field not in known:
            hint = " (null: there is none)" if key == "data.input_field" else ""
            raise UserError(f"{key}: {config.path} has no field {field!r}{hint}; it has {', '.join(sorted(known))}")
    return list(fields)


def _load_dataset(config: DataConfig) -> TextRows:
    from datasets import Dataset, load_dataset  # takes seconds, and files do not need it
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(config.path, config.name, split=config.split)
    except (ValueError, RuntimeError, DatasetsError, *HUB_ERRORS) as error:  # RuntimeError: the data set is a script
        reason = first_line(error)
        raise UserError(f"data.path: no file {config.path}, and not available as a dataset: {reason}") from None
    assert isinstance(dataset, Dataset)
    if not len(dataset):
        raise UserError(f"data.path: {config.path} has no rows in split {config.split}")
    return dataset.select_columns(_read_fields(config, set(dataset.column_names)))
