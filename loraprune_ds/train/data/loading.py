"""Makes samples and held-out text from `data.path`, and keeps them on disk for later runs with the same settings."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import compress, repeat
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
    if source.format == "text":
        key = f"{source.section}.format"
        require(
            starts.target is None,
            f"{key} text: an encoder needs sources with targets; use {key} seq2seq",
        )
        read = partial(_text_of, field=source.text_field)
        return RowFormat(text=read, read=read)
    if source.format == "seq2seq":
        return _pairs(partial(_read_pair, source=source), tokenizer, starts)
    if source.format == "instruction":
        return _pairs(partial(_read_instruction, source=source), tokenizer, starts)
    template = tokens.ChatTemplate(tokenizer)
    if starts.target is not None:
        return _pairs(_of_chat(template.last_turn), tokenizer, starts)
    return RowFormat(
        text=_of_chat(template.render),
        read=_of_chat(template.mark),
        tokenize=template.tokenize,
        check=_of_chat(template.check_roles),
    )


def _of_chat(act: Callable[[tokens.Chat], T]) -> Callable[[TextRow], T]:
    return lambda row: act(tokens.read_chat(row))


def _read_pair(row: TextRow, source: DataSource) -> tokens.Instruction:
    return _text_of(row, source.source_field), _text_of(row, source.target_field)


def _read_instruction(row: TextRow, source: DataSource) -> tokens.Instruction:
    return tokens.make_instruction(
        _text_of(row, source.prompt_field),
        _text_of(row, source.input_field),
        _text_of(row, source.response_field),
    )


def _pairs(
    read: Callable[[TextRow], tokens.Instruction],
    tokenizer: PreTrainedTokenizerBase,
    starts: Starts,
) -> RowFormat:
    """Reads rows as prompt and answer: source and target of an encoder-decoder, where both must have text."""
    tokenize = partial(tokens.tokenize_instructions, tokenizer=tokenizer, start=starts.target)
    if starts.target is None:
        return RowFormat(lambda row: "".join(read(row)), read, tokenize)

    def text(row: TextRow) -> str:
        source, target = read(row)
        return json.dumps({"source": source, "target": target})

    def check(row: TextRow) -> None:
        for name, part in zip(("source", "target"), read(row), strict=True):
            require(part.strip(), f"its {name} is empty")

    return RowFormat(text, read, tokenize, check)


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
    if loaded.epoch_length < minimum:
        raise UserError(_too_short(config, loaded, minimum))
    largest_id = int(loaded.samples.columns["input_ids"].max())
    check_ids(largest_id, vocab_size, tokenizer, "data.path")
    return loaded


def _too_short(config: DataConfig, loaded: LoadedData, minimum: int) -> str:
    paths = " + ".join(source.path for source in config.sources)
    message = (
        f"data.path {paths} is too short: {loaded.epoch_length} samples of {config.window} tokens (data.window); "
        f"one global batch needs {minimum} (train.global_batch_size)"
    )
    if config.max_samples is not None:
        message += f"; data.max_samples is {config.max_samples}"
    left_out = loaded.samples.left_out
    if left_out:
        message += f"; {left_out} more have no answer within data.window"
    return message


def cached(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    starts: Starts,
    make: Callable[[], LoadedData],
) -> LoadedData:
    """Returns the result of `make`, from the disk if an earlier run had these settings."""
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets"))
    folder = cache.expanduser() / "loraprune_ds" / _digest(config, tokenizer, starts)

    def save(new_folder: Path) -> None:
        # given a path, torch would not say that the disk is full
        with (new_folder / SAMPLES_FILE).open("wb") as file:
            torch.save(make(), file)

    try:
        if not folder.exists():
            make_once(folder, save)
    except (OSError, RuntimeError) as error:  # torch raises the second for a full disk
        raise UserError(
            f"the tokens of data.path cannot be kept in {folder}: {one_line(error)}"
        ) from None
    try:
        return _load_checked(folder / SAMPLES_FILE)
    except (OSError, RuntimeError, BadZipFile, ValueError, EOFError) as error:
        raise UserError(
            f"the tokens of data.path in {folder} are damaged; delete the folder to make them again: {one_line(error)}"
        ) from None


def _load_checked(path: Path) -> LoadedData:
    """Loads samples. The memory of the tensors is shared by all ranks of a node."""
    with ZipFile(path) as file:
        for name in file.namelist():
            if "/data/" not in name:  # reading the tensors would take long
                file.read(name)  # checks the sum
    with torch.serialization.safe_globals([LoadedData, Samples]):
        return torch.load(path, mmap=True)


def _digest(config: DataConfig, tokenizer: PreTrainedTokenizerBase, starts: Starts) -> str:
    """Returns a digest of all that decides the samples: settings, files, the tokenizer and this package's code."""
    sources = [source_identity(source) for source in config.sources]
    held_out = Path(config.held_out or "").expanduser()
    held_out_identity = held_out.is_file() and file_identity(held_out)
    settings = (dataclasses.asdict(config), sources, held_out_identity, starts)
    digest = hashlib.sha256(repr(settings).encode())
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        code = Path(__file__).parent.glob("*.py")
        for path in sorted([*Path(scratch).rglob("*.*"), *code]):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _make(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, formats: list[RowFormat], starts: Starts
) -> LoadedData:
    held_out_text = _read_held_out(config, tokenizer, starts)
    parts: list[Samples] = []
    held_out_texts: list[str] = []
    for source, row_format in zip(config.sources, formats, strict=True):
        rows = read_rows(source)
        each = partial(_each, key=f"{source.section}.path", path=source.path)
        if row_format.check is not None:
            for _ in each(row_format.check, enumerate(rows, start=1)):
                pass
        split = _hold_out(rows, source, row_format, config.held_out_fraction)
        read = each(row_format.read, split.tuning)
        if row_format.tokenize is None:
            samples = tokens.pack_documents(
                read, tokenizer, config.window, config.max_samples, starts.window
            )
        else:
            places = (f"row {number} of {source.path}" for number in split.tuning_numbers)
            samples = tokens.collect_rows(
                row_format.tokenize(read), config.window, config.max_samples, places
            )
            if config.packing:
                samples = pack_samples(samples)
        parts.append(samples)
        held_out_texts.append("\n\n".join(each(row_format.text, split.held_out)))
    if held_out_text is None:
        held_out_text = "\n\n".join(held_out_texts)
    return LoadedData(join_samples(parts), held_out_text, _epoch(config.sources, parts))


def _each(
    act: Callable[[TextRow], T], rows: Iterable[NumberedRow], key: str, path: str
) -> Iterator[T]:
    """Yields what `act` makes of each row. Its UserError names the setting, the file and the row's number."""
    for number, row in rows:
        try:
            result = act(row)
        except UserError as error:
            raise UserError(f"{key}: row {number} of {path}: {error}") from None
        yield result


def _epoch(sources: list[DataSource], parts: list[Samples]) -> Tensor | None:
    """Returns the sample numbers of an epoch, if the sources have weights."""
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return None
    for source, part in zip(sources, parts, strict=True):
        require(
            len(part) > 0,
            f"{source.section}.path: {source.path} gives no sample, so it cannot have a weight",
        )
    counts = [len(part) for part in parts]
    repeats = max(count / weight for count, weight in zip(counts, weights, strict=True))
    length = repeats * sum(weights)
    require(
        length <= LONGEST_EPOCH,
        f"data.path: these weights make an epoch of {length:.2g} samples, to see each at least once; "
        f"the limit is {LONGEST_EPOCH:.2g}",
    )
    return mix(counts, weights)


def _read_held_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, starts: Starts
) -> str | None:
    if config.held_out is None:
        return None
    path = Path(config.held_out).expanduser()
    require(path.is_file(), f"data.held_out: {config.held_out} does not exist")
    for source in config.sources:
        if path.resolve() in [file.resolve() for file in files_of(source) or ()]:
            raise UserError(
                f"data.held_out: {config.held_out} is also a part of data.path, which is tuned on"
            )
    if path.suffix not in JSON_SUFFIXES:
        return read_text(path, "data.held_out")
    # whose format may be text
    (source,) = dataclasses.replace(config, path=str(path), packing=False).sources
    row_format = make_format(source, tokenizer, starts)
    rows = enumerate(read_rows(source), start=1)
    return "\n\n".join(_each(row_format.text, rows, "data.held_out", str(path)))


class Split(NamedTuple):
    """Rows to tune on, their numbers, and held-out rows."""

    tuning: Iterable[NumberedRow]
    tuning_numbers: Iterable[int]
    held_out: Iterable[NumberedRow] = ()


def _hold_out(
    rows: TextRows, source: DataSource, row_format: RowFormat, fraction: float | None
) -> Split:
    """Splits rows into tuned rows and evenly spread held-out rows.

    The fraction counts characters, because documents differ in length. With too few documents the end of each one is
    held out.
    """
    count = len(rows)
    all_numbers = range(1, count + 1)
    if fraction is None:
        return Split(enumerate(rows, start=1), all_numbers)
    are_documents = row_format.tokenize is None
    sizes = (len(row_format.text(row)) for row in rows) if are_documents else repeat(1, count)
    chosen = _spread(sizes, fraction)
    if chosen:
        is_tuned = [True] * count
        for i in chosen:
            is_tuned[i] = False
        tuning = compress(enumerate(rows, start=1), is_tuned)
        held_out = ((i + 1, rows[i]) for i in chosen)
        return Split(tuning, compress(all_numbers, is_tuned), held_out)
    require(
        are_documents,
        f"data.held_out_fraction {fraction} of the {count} rows in {source.path} is none; "
        "raise it or give data.held_out",
    )
    heads: list[TextRow] = []
    tails: list[TextRow] = []
    for row in rows:
        head, tail = _split_tail(row_format.text(row), fraction)
        heads.append({source.text_field: head})
        tails.append({source.text_field: tail})
    return Split(enumerate(heads, start=1), all_numbers, enumerate(tails, start=1))


def _spread(sizes: Iterable[int], fraction: float) -> list[int]:
    """Returns the numbers of items that make up `fraction` of the total size.

    An item is chosen if it brings the chosen size nearer to `fraction` of the size so far.
    """
    chosen: list[int] = []
    total = 0
    chosen_total = 0
    for i, size in enumerate(sizes):
        total += size
        if size and chosen_total + size / 2 <= fraction * total:
            chosen_total += size
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
