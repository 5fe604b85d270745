"""Splits a text into windows of tokens, or pairs of texts into labelled rows, to measure a model on them."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import require
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
        rows = list(tokenize_pairs(_read_pairs(text)[:most], tokenizer, starts.target))
        rows = [
            (source, target[: window - len(source)])
            for source, target in rows
            if len(source) < window
        ]
        require(
            bool(rows),
            f"the evaluation text has no source that leaves room for a target in a window of {window}",
        )
        batches = [label_answers(rows[i : i + size]) for i in range(0, len(rows), size)]
    check_ids(max(int(ids.max()) for ids, _ in batches), vocab, tokenizer, "the evaluation text")
    return batches


def _read_pairs(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                pairs.append((row["source"], row["target"]))
                is_pair = all(isinstance(one, str) and one.strip() for one in pairs[-1])
            except (ValueError, TypeError, KeyError, RecursionError):
                is_pair = False
            needed = '{"source": "...", "target": "..."}, as a model with an encoder needs'
            require(is_pair, f"the evaluation text, line {number}: not {needed}; got {line:.40}")
    return pairs


def label_answers(rows: Sequence[tuple[list[int], list[int]]]) -> Labelled:
    """Returns a batch of prompts with their answers, padded at the end. Only the answers have labels."""
    ids = [torch.tensor(prompt + answer, dtype=torch.int64) for prompt, answer in rows]
    labels = [
        torch.tensor([IGNORE_INDEX] * len(prompt) + answer, dtype=torch.int64)
        for prompt, answer in rows
    ]
    # No id changes earlier losses, so any id can pad.
    return pad_sequence(ids, batch_first=True), pad_sequence(
        labels, batch_first=True, padding_value=IGNORE_INDEX
    )


def split_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_windows: int | None,
    start: int | None = None,
) -> Tensor:
    """Returns adjacent windows, (windows, window) int64. The tail that fills no window is dropped.

    Args:
        start: the first id of every window (`Starts.window`). None: the text's own.
    """
    token_ids = tokenize(text, tokenizer, None if max_windows is None else max_windows * window)
    few = f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}"
    require(len(token_ids) >= window, few)
    count = len(token_ids) // window
    return begin_with(token_ids[: count * window].view(count, window)[:max_windows], start)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> Tensor:
    """Returns (tokens,) int64 of the whole text, or of a beginning with at least `needed` tokens."""
    if needed is not None and len(text) > (enough := needed * CHARACTERS_PER_TOKEN):
        # A held-out text can have gigabytes, but only its first windows are used.
        token_ids = tokenize(text[:enough], tokenizer, None)
        if len(token_ids) > needed:
            return token_ids
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
