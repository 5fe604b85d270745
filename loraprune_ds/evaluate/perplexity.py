"""Perplexity of a text, tokenised once as a whole, by fixed or by sliding windows.

Special tokens are what the tokenizer itself adds, once, at the start of the text. The negative log-likelihoods are
summed in float64, over all ranks; their number is known from the windows alone.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError
from loraprune_ds.model.token_loss import IGNORE_INDEX

CHARACTERS_PER_TOKEN = 32  # far more than any tokenizer reaches on prose
# (input_ids, labels), both (batch, length) -> fp32 token losses (batch, length - 1), 0 where the label is IGNORE_INDEX
Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` predictions in `windows` windows."""

    perplexity: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Batch:
    """Windows of equal length, input_ids (rows, length), of each of which the last `predicted` tokens count."""

    input_ids: Tensor
    predicted: int


def cut_windows(text: str, tokenizer: PreTrainedTokenizerBase, window: int, max_windows: int | None) -> Tensor:
    """(windows, window) int64, side by side; the tail that fills no window is dropped.

    Raises:
        UserError: the text is shorter than one window.
    """
    token_ids = tokenize(text, tokenizer, None if max_windows is None else max_windows * window)
    _check_length(token_ids, window)
    count = len(token_ids) // window
    return token_ids[: count * window].view(count, window)[:max_windows]


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> Tensor:
    """(tokens,) int64 of the whole text, or of a beginning that holds the first `needed` tokens."""
    if needed is not None and len(text) > (enough := needed * CHARACTERS_PER_TOKEN):
        # A held-out part can be gigabytes, of which only the first windows are used.
        token_ids = _encode(text[:enough], tokenizer)
        if len(token_ids) > needed:
            return token_ids
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _check_length(token_ids: Tensor, window: int) -> None:
    if len(token_ids) < window:
        raise UserError(f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}")


def fixed_batches(windows: Tensor, batch_size: int) -> list[Batch]:
    """Windows (count, window) that know nothing of each other: window − 1 predictions each."""
    return [Batch(rows, windows.shape[1] - 1) for rows in windows.split(batch_size)]


def sliding_batches(
    token_ids: Tensor, window: int, stride: int, max_windows: int | None, batch_size: int
) -> list[Batch]:
    """Windows that begin every `stride` < `window` tokens; every token but the first is predicted exactly once.

    The first window predicts all its tokens, each later one only those that no earlier window held, so with at least
    window − stride tokens before them. The last window ends with the text and is shorter.

    Args:
        token_ids: (tokens,).

    Raises:
        UserError: the text is shorter than one window.
    """
    _check_length(token_ids, window)
    rows = token_ids.unfold(0, window, stride)[:max_windows]
    batches = [Batch(rows[:1], window - 1)]
    batches += [Batch(later, stride) for later in rows[1:].split(batch_size) if len(later)]
    end = (len(rows) - 1) * stride + window
    if len(rows) != max_windows and end < len(token_ids):
        batches.append(Batch(token_ids[None, len(rows) * stride :], len(token_ids) - end))
    return batches


def measure_perplexity(
    losses: Losses,
    windows: Tensor,
    batch_size: int,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> Perplexity:
    """Of fixed windows (count, window); see `measure_batches`."""
    batches = fixed_batches(windows, batch_size)
    return measure_batches(
        losses, batches, device=device, rank=rank, world_size=world_size, sum_over_ranks=sum_over_ranks
    )


@torch.no_grad()
def measure_batches(
    losses: Losses,
    batches: list[Batch],
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
    watch: Callable[[Iterable[int]], Iterable[int]] = lambda rounds: rounds,
) -> Perplexity:
    """The same number on any number of ranks: each takes every W-th batch.

    All ranks run `losses` equally often, since a sharded model gathers its weights in it; a rank that is out of
    batches repeats the first one and does not count it. `watch` goes through the rounds, to show how far they are.
    """
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for round_start in watch(range(0, len(batches), world_size)):
        mine = round_start + rank
        batch = batches[mine if mine < len(batches) else 0]
        input_ids = batch.input_ids.to(device)
        labels = input_ids.clone()
        labels[:, : -batch.predicted] = IGNORE_INDEX
        found = losses(input_ids, labels).double().sum()
        if mine < len(batches):
            total += found
    tokens = sum(len(batch.input_ids) * batch.predicted for batch in batches)
    mean = sum_over_ranks(total).item() / tokens
    perplexity = math.inf if mean > 700 else math.exp(mean)  # beyond what a float holds; NaN stays NaN
    return Perplexity(perplexity, tokens, sum(len(batch.input_ids) for batch in batches))
