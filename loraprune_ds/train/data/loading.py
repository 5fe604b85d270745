"""Reads `data.path`, holds a part of it out, and makes samples of the rest."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraprune_ds.config import DataConfig
from loraprune_ds.errors import UserError
from loraprune_ds.train.data.chat import ChatTemplate, read_chat, tokenize_chats
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.data.sources import JSON_SUFFIXES, TextRow, TextRows, local_files, read_rows, read_text_file
from loraprune_ds.train.data.tokens import Instruction, collect_rows, make_instruction, mask_prompts, pack_documents

LINE_END_WITHIN = 1000  # characters before the middle of a document where the end of a line may lie


@dataclass(frozen=True)
class LoadedData:
    """Holds the samples to tune on, and a text for perplexity that tuning never sees."""

    samples: Samples
    held_out: str


def load_samples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum: int,
    vocab_size: int,
    start: int | None = None,
) -> LoadedData:
    """Loads samples and held-out text. They are the same on every rank that reads the same files.

    Args:
        minimum: samples of one global batch.
        vocab_size: number of ids that the model knows.
        start: as `pack_documents` takes it. An instruction begins as the tokenizer begins a text.

    Raises:
        UserError: the data cannot be read, does not fit the model, or is shorter than one global batch.
    """
    if config.max_samples is not None and config.max_samples < minimum:
        raise UserError(f"data.max_samples {config.max_samples} is below train.global_batch_size {minimum}")
    if config.format == "chat":
        ChatTemplate(tokenizer)  # before anything is read
    held_out_text = _read_held_out(config, tokenizer)
    tuning, held_out = _hold_out(read_rows(config), config)
    samples = _make_samples(tuning, tokenizer, config, start)
    _check_samples(samples, config, minimum, vocab_size)
    if held_out_text is None:
        held_out_text = _join_text(held_out, config, tokenizer)
    return LoadedData(samples, held_out_text)


def _make_samples(
    rows: Iterable[TextRow], tokenizer: PreTrainedTokenizerBase, config: DataConfig, start: int | None
) -> Samples:
    if config.format == "text":
        documents = (_text_of(row, config.text_field) for row in rows)
        return pack_documents(documents, tokenizer, config.window, config.max_samples, start)
    if config.format == "chat":
        return collect_rows(tokenize_chats(map(read_chat, rows), tokenizer), config.window, config.max_samples)
    instructions = (_instruction_of(row, config) for row in rows)
    return mask_prompts(instructions, tokenizer, config.window, config.max_samples)


def _check_samples(samples: Samples, config: DataConfig, minimum: int, vocab_size: int) -> None:
    if len(samples) < minimum:
        raise UserError(
            f"data.path {config.path} is too short: {len(samples)} samples of {config.window} tokens (data.window); "
            f"one global batch needs {minimum} (train.global_batch_size)"
            + (f"; {samples.left_out} more have no answer within data.window" if samples.left_out else "")
        )
    if (largest := samples.largest_id()) >= vocab_size:
        raise UserError(f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}")


def _read_held_out(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Reads the text of `data.held_out`. None if the config names no such file."""
    if config.held_out is None:
        return None
    path = Path(config.held_out).expanduser()
    if path.resolve() in [file.resolve() for file in local_files(config.path) or []]:
        raise UserError(f"data.held_out: {config.held_out} is tuned on too, as a part of data.path")
    if path.suffix not in JSON_SUFFIXES:
        return read_text_file(path)
    return _join_text(read_rows(replace(config, path=str(path))), config, tokenizer)


def _hold_out(rows: TextRows, config: DataConfig) -> tuple[Iterable[TextRow], Iterable[TextRow]]:
    """Splits rows into those to tune on and those to hold out, which are spread evenly.

    Documents differ a lot in length. So the fraction is one of their characters, not of their number. If there are too
    few documents for that, the end of each document is held out.
    """
    if config.held_out is not None:
        return rows, ()
    fraction = config.held_out_fraction
    if config.format == "text":
        chosen = _spread((len(_text_of(row, config.text_field)) for row in rows), fraction)
    else:
        chosen = _spread(repeat(1, len(rows)), fraction)
    if chosen:
        left_out = set(chosen)
        return (row for i, row in enumerate(rows) if i not in left_out), (rows[i] for i in chosen)
    if config.format != "text":
        raise UserError(
            f"data.held_out_fraction {fraction} of the {len(rows)} {config.format}s in {config.path} is none; raise it "
            "or give data.held_out"
        )
    parts = [_split_tail(_text_of(row, config.text_field), fraction) for row in rows]
    return [{config.text_field: head} for head, _ in parts], [{config.text_field: tail} for _, tail in parts]


def _spread(sizes: Iterable[int], fraction: float) -> list[int]:
    """Chooses items whose sizes make up `fraction` of all, spread evenly. Returns their numbers.

    An item is chosen if it brings the size chosen nearer to `fraction` of the size seen so far.
    """
    chosen, seen, taken = [], 0, 0
    for i, size in enumerate(sizes):
        seen += size
        if size and taken + size / 2 <= fraction * seen:
            taken += size
            chosen.append(i)
    return chosen


def _split_tail(text: str, fraction: float) -> tuple[str, str]:
    """Splits a document in two. The second part is about `fraction` of it and begins at a line if one is near."""
    middle = math.floor(len(text) * (1 - fraction))
    line_end = text.rfind("\n", max(0, middle - LINE_END_WITHIN), middle) + 1
    cut = line_end or middle
    return text[:cut], text[cut:]


def _join_text(rows: Iterable[TextRow], config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    if config.format == "chat":
        template = ChatTemplate(tokenizer)
        return "\n\n".join(template.render(read_chat(row)) for row in rows)
    return "\n\n".join(_whole_text_of(row, config) for row in rows)


def _whole_text_of(row: TextRow, config: DataConfig) -> str:
    if config.format == "text":
        return _text_of(row, config.text_field)
    instruction = _instruction_of(row, config)
    return instruction.prompt + instruction.response


def _instruction_of(row: TextRow, config: DataConfig) -> Instruction:
    about = "" if config.input_field is None else _text_of(row, config.input_field)
    return make_instruction(_text_of(row, config.prompt_field), about, _text_of(row, config.response_field))


def _text_of(row: TextRow, field: str) -> str:
    value = row.get(field)
    if value is None:  # rows of real data have gaps
        return ""
    if not isinstance(value, str):
        raise UserError(f"field {field!r} must be text; a row has {value!r:.80}")
    return value
