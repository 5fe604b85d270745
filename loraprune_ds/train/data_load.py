"""Reads `data.path`, keeps a part of it away from tuning, and makes samples of the rest."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loraprune_ds.config import DataConfig
from loraprune_ds.errors import UserError
from loraprune_ds.train.data import Samples
from loraprune_ds.train.data_sources import JSON_SUFFIXES, Row, Rows, local_files, read_rows, read_text_file
from loraprune_ds.train.data_tokens import Instruction, make_instruction, mask_prompts, pack_documents

LINE_END_WITHIN = 1000  # characters before a cut through a document where a line may end


@dataclass(frozen=True)
class LoadedData:
    """What to tune on, and a text that tuning never sees, for perplexity."""

    samples: Samples
    held_out: str


def load_samples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    minimum: int,
    vocab_size: int,
) -> LoadedData:
    """Samples and held-out text; the same on every rank that reads the same files.

    Args:
        minimum: samples of one global batch.
        vocab_size: ids the model knows.

    Raises:
        UserError: the data cannot be read, does not fit the model, or is shorter than one global batch.
    """
    if config.max_samples is not None and config.max_samples < minimum:
        raise UserError(f"data.max_samples {config.max_samples} is below train.global_batch_size {minimum}")
    held_out_text = _read_held_out(config)
    tuning, held_out = _split(read_rows(config), config)
    if config.format == "text":
        documents = (_text_of(row, config.text_field) for row in tuning)
        samples = pack_documents(documents, tokenizer, config.window, config.max_samples)
    else:
        instructions = (_instruction_of(row, config) for row in tuning)
        samples = mask_prompts(instructions, tokenizer, config.window, config.max_samples)
    if len(samples) < minimum:
        raise UserError(
            f"data.path {config.path} is too short: {len(samples)} samples of {config.window} tokens (data.window); "
            f"one global batch needs {minimum} (train.global_batch_size)"
            + (f"; {samples.left_out} more have no response within data.window" if samples.left_out else "")
        )
    if (largest := samples.largest_id()) >= vocab_size:
        raise UserError(f"the tokenizer gives id {largest}, but the model's vocab_size is {vocab_size}")
    if held_out_text is None:
        held_out_text = _join_text(held_out, config)
    return LoadedData(samples, held_out_text)


def _read_held_out(config: DataConfig) -> str | None:
    if config.held_out is None:
        return None
    path = Path(config.held_out).expanduser()
    if path.resolve() in [file.resolve() for file in local_files(config.path) or []]:
        raise UserError(f"data.held_out: {config.held_out} is tuned on too, as a part of data.path")
    if path.suffix not in JSON_SUFFIXES:
        return read_text_file(path)
    return _join_text(read_rows(replace(config, path=str(path))), config)


def _split(rows: Rows, config: DataConfig) -> tuple[Iterable[Row], Iterable[Row]]:
    """Rows to tune on and rows to hold out, evenly spread; of documents too few for that, the ends are held out.

    Documents differ a lot in length, so it is their characters that the fraction is of.
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
    if config.format == "instruction":
        raise UserError(
            f"data.held_out_fraction {fraction} of the {len(rows)} instructions in {config.path} is none; raise it or "
            "give data.held_out"
        )
    parts = [_split_tail(_text_of(row, config.text_field), fraction) for row in rows]
    return [{config.text_field: head} for head, _ in parts], [{config.text_field: tail} for _, tail in parts]


def _spread(sizes: Iterable[int], fraction: float) -> list[int]:
    """Numbers of the items to take: each that brings the size taken nearer to `fraction` of the size seen so far."""
    chosen, seen, taken = [], 0, 0
    for i, size in enumerate(sizes):
        seen += size
        if size and taken + size / 2 <= fraction * seen:
            taken += size
            chosen.append(i)
    return chosen


def _split_tail(text: str, fraction: float) -> tuple[str, str]:
    """A document cut in two, the second part about `fraction` of it, at the end of a line if one is near."""
    middle = math.floor(len(text) * (1 - fraction))
    line_end = text.rfind("\n", max(0, middle - LINE_END_WITHIN), middle) + 1
    cut = line_end or middle
    return text[:cut], text[cut:]


def _join_text(rows: Iterable[Row], config: DataConfig) -> str:
    return "\n\n".join(_whole_text_of(row, config) for row in rows)


def _whole_text_of(row: Row, config: DataConfig) -> str:
    if config.format == "text":
        return _text_of(row, config.text_field)
    instruction = _instruction_of(row, config)
    return instruction.prompt + instruction.response


def _instruction_of(row: Row, config: DataConfig) -> Instruction:
    material = "" if config.input_field is None else _text_of(row, config.input_field)
    return make_instruction(_text_of(row, config.prompt_field), material, _text_of(row, config.response_field))


def _text_of(row: Row, field: str) -> str:
    value = row.get(field)
    if value is None:  # rows of real data have gaps
        return ""
    if not isinstance(value, str):
        raise UserError(f"field {field!r} must be text; a row has {value!r:.80}")
    return value
