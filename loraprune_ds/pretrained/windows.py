"""Splits a text into windows of tokens, or pairs of texts into labelled rows, to measure a model on them."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError, require
from loraprune_ds.model.perplexity import Labelled
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.pretrained.tokenizer import Starts, begin_with, check_ids, tokenize_pairs

CHARACTERS_PER_TOKEN = 32  # far more than a tokenizer reaches on prose


def split_batches(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    most: int | None,
    starts: Starts,
    size: int,
    vocab: int,
) -> list[Labelled]:
    """Returns batches of `size` windows of a text. For an encoder-decoder a row is a line's target after its source.

    Args:
        most: windows or lines to take. None: all.

    Raises:
        UserError: the text is too short or of another form, or it has an id that the embedding lacks.
    """
    if starts.target is None:
        windows = split_windows(text, tokenizer, window, most, starts.window)
        batches = [(ids, ids) for ids in windows.split(size)]
    else:
        pairs = tokenize_pairs(_read_pairs(text)[:most], tokenizer, starts.target)
        rows = [
            (source, target[: window - len(source)])
            for source, target in pairs
            if len(source) < window
        ]
        require(
            rows,
            f"the evaluation text has no source that leaves room for a target in a window of {window}",
        )
        batches = [label_answers(rows[i : i + size]) for i in range(0, len(rows), size)]
    check_ids(max(int(ids.max()) for ids, _ in batches), vocab, tokenizer, "the evaluation text")
    return batches


def _read_pairs(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        pair = _read_pair(line)
        if pair is None:
            raise UserError(
                f'the evaluation text, line {number}: not {{"source": "...", "target": "..."}}, '
                f"as a model with an encoder needs; got {line:.40}"
            )
        pairs.append(pair)
    return pairs


def _read_pair(line: str) -> tuple[str, str] | None:
    try:
        row = json.loads(line)
        pair = (row["source"], row["target"])
        has_text = all(part.strip() for part in pair)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return pair if has_text else None


def label_answers(rows: Sequence[tuple[list[int], list[int]]]) -> Labelled:
    """Returns a batch of prompts with their answers, padded at the end. Only the answers have labels."""
    ids = [torch.tensor(prompt + answer) for prompt, answer in rows]
    labels = [torch.tensor([IGNORE_INDEX] * len(prompt) + answer) for prompt, answer in rows]
    padded_ids = pad_sequence(ids, batch_first=True)  # no id changes earlier losses, so any can pad
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return padded_ids, padded_labels


def split_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_windows: int | None,
    start: int | None = None,
) -> Tensor:
    """Returns adjacent windows, (windows, window) int64. The tail that fills no window is dropped.

    Args:
        start: the first id of every window (`Starts.window`). None leaves the text unchanged.
    """
    needed = None if max_windows is None else max_windows * window
    token_ids = tokenize(text, tokenizer, needed)
    require(
        len(token_ids) >= window,
        f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}",
    )
    count = len(token_ids) // window
    windows = token_ids[: count * window].view(count, window)
    return begin_with(windows[:max_windows], start)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> Tensor:
    """Returns (tokens,) int64 of the whole text, or of a beginning with at least `needed` tokens."""
    if needed is not None:
        # A held-out text can have gigabytes, but only its first windows are used.
        beginning = text[: needed * CHARACTERS_PER_TOKEN]
        if len(beginning) < len(text):
            token_ids = tokenize(beginning, tokenizer, None)
            if len(token_ids) > needed:
                return token_ids
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
