"""Reads the rows of `data.path` from files, a `datasets` name, or Python's own help."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from loraprune_ds.config import DataConfig, DataSource
from loraprune_ds.config_sources import files_of, refuse_hub_settings
from loraprune_ds.errors import UserError, first_line, require
from loraprune_ds.files import file_identity, open_text, read_text
from loraprune_ds.pretrained.sources import EMBEDDED, HUB_ERRORS, embedded_text
from loraprune_ds.train.data.tokens import chat_fields

# The settings that name the text fields of a row. The fields of a conversation have fixed names.
FIELD_SETTINGS = {
    "text": ("text_field",),
    "instruction": ("prompt_field", "response_field", "input_field"),
    "seq2seq": ("source_field", "target_field"),
    "chat": (),
}
HALF = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # half of a surrogate pair, or a lone surrogate
TextRow = Mapping[str, Any]
TextRows = Sequence[TextRow]  # a list or a `datasets.Dataset`


def read_rows(source: DataSource) -> TextRows:
    """Reads all rows of a source. A text file is one row.

    Raises:
        UserError: the path does not exist, a file cannot be read (names file and line), or a field is unknown.
    """
    if source.path == EMBEDDED:
        require(
            source.format == "text",
            f"{source.section}.format {source.format} needs a data.path; the embedded text is plain text",
        )
        refuse_hub_settings(source)
        return [{source.text_field: document} for document in embedded_text()]
    files = files_of(source)
    if files is None:
        return _load_dataset(source)
    rows = [row for file in files for row in _read_rows_of_file(file, source)]
    _read_fields(source, set().union(*rows))
    return rows


def source_identity(source: DataSource) -> object:
    """Returns a value that differs after the rows of a source have changed."""
    if source.path == EMBEDDED:
        return embedded_text()
    files = files_of(source)
    if files is None:
        return _load_dataset(source)._fingerprint
    return [file_identity(file) for file in files]


def resolve_commits(config: DataConfig) -> dict[str, str]:
    """Returns the commits of all data sets of the hub, by their sections. Later starts of a run take the same."""
    return {
        source.section: _ask_hub("load_dataset_builder", source).hash
        for source in config.sources
        if source.path != EMBEDDED and files_of(source) is None
    }


def at_commits(config: DataConfig, commits: Mapping[str, str]) -> DataConfig:
    """Returns the same data with these commits as revisions."""
    if isinstance(config.path, str):
        return replace(config, revision=commits.get("data", config.revision))
    entries = [
        replace(entry, revision=commits.get(source.section, source.revision))
        for entry, source in zip(config.path, config.sources, strict=True)
    ]
    return replace(config, path=entries)


def _text_fields(source: DataSource) -> dict[str, str]:
    """Maps the text fields that a row must have to the settings that name them."""
    fields: dict[str, str] = {}
    for key in FIELD_SETTINGS[source.format]:
        field = getattr(source, key)
        if field is not None:
            fields[field] = f"{source.section}.{key}"
    return fields


def _read_rows_of_file(path: Path, source: DataSource) -> list[TextRow]:
    fields = _text_fields(source)
    rows: list[TextRow] = []
    for where, row in _values(path, source):
        require(isinstance(row, dict), f"{where}: expected an object, got {type(row).__name__}")
        for field in fields:
            if not isinstance(row.get(field), str | None):  # rows of real data have gaps
                raise UserError(f"{where}: field {field!r} must be text; got {row[field]!r:.80}")
        rows.append(row)
    require(rows, f"{source.section}: {path} is empty")
    return rows


def _values(path: Path, source: DataSource) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file with their place. `datasets` would not name the line, and would parse dates."""
    if path.suffix == ".jsonl":
        with open_text(path, source.section) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parse_json(line.rstrip(), path, number)
        return
    text = read_text(path, source.section)
    if path.suffix == ".json":
        items = _parse_json(text, path, 1)
        require(
            isinstance(items, list) and items,
            f"{path} must hold a list of objects (one object per line goes into a .jsonl file)",
        )
        for i, item in enumerate(items):
            yield f"{path}, item {i}", item
    elif source.format == "text":
        yield str(path), {source.text_field: text}
    else:
        raise UserError(
            f"{source.section}.format {source.format} needs .json or .jsonl files; {path} is plain text"
        )


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        place = re.fullmatch(r"(.+) at line (\d+) column (\d+)", str(error))
    if HALF.search(text):  # no tokenizer accepts a surrogate
        with suppress(ValueError, RecursionError):
            value = json.dumps(json.loads(text), ensure_ascii=False)
            return from_json(value.encode(errors="replace"))
    assert place, "pydantic names the place of an error"
    reason, line, column = place.groups()
    where = f"{path}, line {first_line + int(line) - 1}, column {column}"
    raise UserError(f"{where}: not valid JSON: {reason}")


def _read_fields(source: DataSource, available: set[str]) -> list[str]:
    """Returns the fields to read. Raises UserError if the rows lack one."""
    if source.format == "chat":
        return chat_fields(available, source)
    fields = _text_fields(source)
    for field, key in fields.items():
        if field not in available:
            hint = " (data.input_field null: there is none)" if key.endswith(".input_field") else ""
            raise UserError(
                f"{key}: {source.path} has no field {field!r}{hint}; it has {', '.join(sorted(available))}"
            )
    return list(fields)


def _ask_hub(function: str, source: DataSource, **more: str) -> Any:
    """Calls a function of `datasets` for a source."""
    import datasets  # takes seconds, which files do not need
    from datasets.exceptions import DatasetsError

    try:
        return getattr(datasets, function)(
            source.path, source.name, data_files=source.data_files, revision=source.revision, **more
        )
    # RuntimeError: the data set is a script
    except (ValueError, RuntimeError, DatasetsError, *HUB_ERRORS) as error:
        raise UserError(
            f"{source.section}.path: no file {source.path}, and not available as a dataset: {first_line(error)}"
        ) from None


def _load_dataset(source: DataSource) -> Any:
    """Loads a split as a `datasets.Dataset` of the columns that are read."""
    dataset = _ask_hub("load_dataset", source, split=source.split)
    require(
        len(dataset) > 0,
        f"{source.section}.path: {source.path} has no rows in split {source.split}",
    )
    return dataset.select_columns(_read_fields(source, set(dataset.column_names)))
