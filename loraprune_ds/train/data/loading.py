"""Makes samples and held-out text from `data.path`, and keeps them on disk for later runs with the same settings."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile, ZipFile

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.config import DataConfig, DataSource
from loraprune_ds.config_sources import JSON_SUFFIXES, files_of
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import file_identity, make_once, read_text
from loraprune_ds.pretrained.tokenizer import Starts, check_ids
from loraprune_ds.train.data import tokens
from loraprune_ds.train.data.samples import LoadedData, Samples, join_samples, mix, pack_samples
from loraprune_ds.train.data.sources import TextRow, TextRows, read_rows, source_identity

SAMPLES_FILE = "samples.pt"
LONGEST_EPOCH = 1_000_000_000  # samples of a mixture, of 8 bytes each
NumberedRow = tuple[int, TextRow]  # from 1
T = TypeVar("T")
LINE_END_WITHIN = 1000  # characters before the split of a document, in which a line may end


class RowFormat(NamedTuple):
    """Converts the rows of a source to text and tokens."""

    text: Callable[[TextRow], str]
    read: Callable[[TextRow], Any]  # an input of `tokenize`, or a document
    # None: documents fill windows
    tokenize: Callable[[Iterable[Any]], Iterator[tokens.TokenizedRow]] | None = None
    # checks all rows in seconds, before minutes of tokenising
    check: Callable[[TextRow], None] | None = None


def make_format(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, starts: Starts
) -> RowFormat:
    """Makes the format of a source. Raises UserError if the tokenizer or the model does not fit it."""
    make_pairs = partial(_pairs, tokenizer=tokenizer, starts=starts)
    match source.format:
        case "text":
            key = f"{source.section}.format"
            require(
                starts.target is None,
                f"{key} text: an encoder needs sources with targets; use {key} seq2seq",
            )
            read = partial(_text_of, field=source.text_field)
            return RowFormat(read, read)
        case "seq2seq":
            return make_pairs(
                lambda row: (_text_of(row, source.source_field), _text_of(row, source.target_field))
            )
        case "instruction":
            fields = source.prompt_field, source.input_field, source.response_field
            return make_pairs(
                lambda row: tokens.make_instruction(*(_text_of(row, field) for field in fields))
            )
    template = tokens.ChatTemplate(tokenizer)
    if starts.target is not None:
        return make_pairs(lambda row: template.last_turn(tokens.read_chat(row)))
    return RowFormat(
        lambda row: template.render(tokens.read_chat(row)),
        lambda row: template.mark(tokens.read_chat(row)),
        template.tokenize,
        lambda row: template.check_roles(tokens.read_chat(row)),
    )


def _pairs(
    read: Callable[[TextRow], tokens.Instruction],
    tokenizer: PreTrainedTokenizerBase,
    starts: Starts,
) -> RowFormat:
    """Reads rows as prompt and answer: source and target of an encoder-decoder, where both must have text."""
    tokenize = partial(tokens.tokenize_instructions, tokenizer=tokenizer, start=starts.target)

    def named(row: TextRow) -> dict[str, str]:
        return dict(zip(("source", "target"), read(row), strict=True))

    def check(row: TextRow) -> None:
        for name, text in named(row).items():
            require(bool(text.strip()), f"its {name} is empty")

    if starts.target is None:
        return RowFormat(lambda row: "".join(read(row)), read, tokenize)
    return RowFormat(lambda row: json.dumps(named(row)), read, tokenize, check)


def load_samples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum: int,
    vocab_size: int,
    starts: Starts,
) -> LoadedData:
    """Loads samples and held-out text.

    Args:
        minimum: samples of one global batch.
        starts: first ids of windows and targets. An instruction begins as the tokenizer begins a text.

    Raises:
        UserError: the data cannot be read, does not fit the model, or is shorter than one global batch.
    """
    # An error here comes before a long download.
    formats = [make_format(source, tokenizer, starts) for source in config.sources]
    loaded = cached(config, tokenizer, starts, lambda: _make(config, tokenizer, formats, starts))
    samples = loaded.samples
    found = f"{loaded.epoch_length} samples of {config.window} tokens (data.window)"
    needed = f"one global batch needs {minimum} (train.global_batch_size)"
    needed += "" if config.max_samples is None else f"; data.max_samples is {config.max_samples}"
    needed += (
        f"; {samples.left_out} more have no answer within data.window" if samples.left_out else ""
    )
    paths = " + ".join(source.path for source in config.sources)
    require(loaded.epoch_length >= minimum, f"data.path {paths} is too short: {found}; {needed}")
    check_ids(int(samples.columns["input_ids"].max()), vocab_size, tokenizer, "data.path")
    return loaded


def cached(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    starts: Starts,
    make: Callable[[], LoadedData],
) -> LoadedData:
    """Returns the result of `make`, from the disk if an earlier run had these settings."""
    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    folder = Path(cache).expanduser() / "loraprune_ds" / _digest(config, tokenizer, starts)

    def save(made: Path) -> None:
        # given a path, torch would not say that the disk is full
        with (made / SAMPLES_FILE).open("wb") as file:
            torch.save(make(), file)

    try:
        if not folder.exists():
            make_once(folder, save)
    except (OSError, RuntimeError) as error:  # torch raises the second for a full disk
        raise UserError(
            f"the tokens of data.path cannot be kept in {folder}: {one_line(error)}"
        ) from None
    try:
        with ZipFile(folder / SAMPLES_FILE) as file:  # checks sums, but not of the tensors
            for name in (name for name in file.namelist() if "/data/" not in name):
                file.read(name)
        with torch.serialization.safe_globals([LoadedData, Samples]):
            # its memory is shared by all ranks of a node
            return torch.load(folder / SAMPLES_FILE, mmap=True)
    except (OSError, RuntimeError, BadZipFile, ValueError, EOFError) as error:
        damaged = (
            f"the tokens of data.path in {folder} are damaged; delete the folder to make them again"
        )
        raise UserError(f"{damaged}: {one_line(error)}") from None


def _digest(config: DataConfig, tokenizer: PreTrainedTokenizerBase, starts: Starts) -> str:
    sources = [source_identity(source) for source in config.sources]
    held_out = Path(config.held_out or "").expanduser()
    parts = (
        dataclasses.asdict(config),
        sources,
        held_out.is_file() and file_identity(held_out),
        starts,
    )
    digest = hashlib.sha256(repr(parts).encode())
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted([*Path(scratch).rglob("*.*"), *Path(__file__).parent.glob("*.py")]):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _make(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, formats: list[RowFormat], starts: Starts
) -> LoadedData:
    held_out_text = _read_held_out(config, tokenizer, starts)
    parts, held_out_texts = [], []
    for source, row_format in zip(config.sources, formats, strict=True):
        rows = read_rows(source)
        named = f"{source.section}.path", source.path
        if row_format.check is not None:
            for _ in _each(row_format.check, enumerate(rows, start=1), *named):
                pass
        tuning, held_out, numbers = _hold_out(rows, source, row_format, config.held_out_fraction)
        read = _each(row_format.read, tuning, *named)
        if row_format.tokenize is None:
            samples = tokens.pack_documents(
                read, tokenizer, config.window, config.max_samples, starts.window
            )
        else:
            places = (f"row {number} of {source.path}" for number in numbers)
            samples = tokens.collect_rows(
                row_format.tokenize(read), config.window, config.max_samples, places
            )
            samples = pack_samples(samples) if config.packing else samples
        parts.append(samples)
        held_out_texts.append("\n\n".join(_each(row_format.text, held_out, *named)))
    text = "\n\n".join(held_out_texts) if held_out_text is None else held_out_text
    return LoadedData(join_samples(parts), text, _epoch(config.sources, parts))


def _each(
    act: Callable[[TextRow], T], rows: Iterable[NumberedRow], key: str, path: str
) -> Iterator[T]:
    """Yields what `act` makes of each row. Its UserError names the setting, the file and the row's number."""
    for number, row in rows:
        try:
            made = act(row)
        except UserError as error:
            raise UserError(f"{key}: row {number} of {path}: {error}") from None
        yield made


def _epoch(sources: list[DataSource], parts: list[Samples]) -> Tensor | None:
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return None
    for source, part in zip(sources, parts, strict=True):
        require(
            len(part) > 0,
            f"{source.section}.path: {source.path} gives no sample, so it cannot have a weight",
        )
    length = max(len(part) / weight for part, weight in zip(parts, weights, strict=True)) * sum(
        weights
    )
    long = (
        f"data.path: these weights make an epoch of {length:.2g} samples, to see each at least once"
    )
    require(length <= LONGEST_EPOCH, f"{long}; the limit is {LONGEST_EPOCH:.2g}")
    return mix([len(part) for part in parts], weights)


def _read_held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, starts: Starts
) -> str | None:
    if config.held_out is None:
        return None
    path = Path(config.held_out).expanduser()
    require(path.is_file(), f"data.held_out: {config.held_out} does not exist")
    if path.resolve() in [
        file.resolve() for source in config.sources for file in files_of(source) or []
    ]:
        raise UserError(
            f"data.held_out: {config.held_out} is also a part of data.path, which is tuned on"
        )
    if path.suffix not in JSON_SUFFIXES:
        return read_text(path, "data.held_out")
    # whose format may be text
    (source,) = dataclasses.replace(config, path=str(path), packing=False).sources
    text, rows = make_format(source, tokenizer, starts).text, enumerate(read_rows(source), start=1)
    return "\n\n".join(_each(text, rows, "data.held_out", str(path)))


def _hold_out(
    rows: TextRows, source: DataSource, row_format: RowFormat, fraction: float | None
) -> tuple[Iterable[NumberedRow], Iterable[NumberedRow], Iterable[int]]:
    """Splits rows into tuned rows and evenly spread held-out rows. Returns the numbers of the tuned rows, too.

    The fraction counts characters, because documents differ in length. With too few documents the end of each one is
    held out.
    """
    if fraction is None:
        return enumerate(rows, start=1), (), range(1, len(rows) + 1)
    are_documents = row_format.tokenize is None
    sizes = (len(row_format.text(row)) for row in rows) if are_documents else repeat(1, len(rows))
    if chosen := _spread(sizes, fraction):
        left_out = set(chosen)
        tuning = ((i + 1, row) for i, row in enumerate(rows) if i not in left_out)
        return (
            tuning,
            ((i + 1, rows[i]) for i in chosen),
            (i + 1 for i in range(len(rows)) if i not in left_out),
        )
    none = f"data.held_out_fraction {fraction} of the {len(rows)} rows in {source.path} is none"
    require(are_documents, f"{none}; raise it or give data.held_out")
    parts = [_split_tail(row_format.text(row), fraction) for row in rows]
    heads, tails = ([{source.text_field: pair[half]} for pair in parts] for half in (0, 1))
    return enumerate(heads, start=1), enumerate(tails, start=1), range(1, len(parts) + 1)


def _spread(sizes: Iterable[int], fraction: float) -> list[int]:
    """Returns the numbers of items that make up `fraction` of the total size.

    An item is chosen if it brings the chosen size nearer to `fraction` of the size so far.
    """
    chosen, seen, taken = [], 0, 0
    for i, size in enumerate(sizes):
        seen += size
        if size and taken + size / 2 <= fraction * seen:
            taken += size
            chosen.append(i)
    return chosen


def _split_tail(text: str, fraction: float) -> tuple[str, str]:
    """Splits off about `fraction` of a document, from the start of a line if one is near."""
    middle = math.floor(len(text) * (1 - fraction))
    cut = text.rfind("\n", max(0, middle - LINE_END_WITHIN), middle) + 1 or middle
    return text[:cut], text[cut:]


def _text_of(row: TextRow, field: str | None) -> str:
    value = None if field is None else row.get(field)
    if not isinstance(value, str | None):
        raise UserError(f"field {field!r} must be text; a row has {value!r:.80}")
    return value or ""  # real data has rows with gaps
