"""Perplexity of a text, which is tokenised once, on fixed or sliding windows.

The tokenizer adds its special tokens once, at the start of the text. A Gemma predicts badly without BOS, so BOS
replaces the first token of each of its windows, which no window predicts. llama.cpp measures the same way. Negative
log-likelihoods are summed in float64 over all ranks.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.settings import PerplexityProtocol
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.model.tokenizer import begin_with

if TYPE_CHECKING:  # it imports DeepSpeed
    from loraprune_ds.zero.comm import Communicator

CHARACTERS_PER_TOKEN = 32  # far more than a tokenizer reaches on prose
# (input_ids, labels), both (batch, length) -> fp32 token losses (batch, length - 1), 0 where the label is IGNORE_INDEX
Losses = Callable[[Tensor, Tensor], Tensor]
# Wraps the rounds of a loop to show its progress, with a word for the work.
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` predictions in `windows` windows."""

    perplexity: float
    tokens: int
    windows: int


@dataclass(frozen=True)
class Batch:
    """Windows of equal length, input_ids (rows, length). The last `predicted` tokens of each count."""

    input_ids: Tensor
    predicted: int

    @property
    def labels(self) -> Tensor:
        labels = self.input_ids.clone()
        labels[:, : -self.predicted] = IGNORE_INDEX
        return labels


def make_batches(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    protocol: PerplexityProtocol,
    batch_size: int,
    start: int | None = None,
) -> list[Batch]:
    """Tokenises the text and splits it into batches of `batch_size` windows.

    Args:
        start: the first id of every window (tokenizer.window_start). None: the text's own.
    """
    window, stride, most = protocol.window, protocol.stride, protocol.max_windows
    if stride is None:
        return fixed_batches(split_windows(text, tokenizer, window, most, start), batch_size)
    token_ids = tokenize(text, tokenizer, None if most is None else (most - 1) * stride + window)
    batches = sliding_batches(token_ids, window, stride, most, batch_size)
    return [replace(batch, input_ids=begin_with(batch.input_ids, start)) for batch in batches]


def split_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, max_windows: int | None, start: int | None = None
) -> Tensor:
    """Returns (windows, window) int64, side by side. The tail that fills no window is dropped. `start`: as above."""
    token_ids = tokenize(text, tokenizer, None if max_windows is None else max_windows * window)
    _check_length(token_ids, window)
    count = len(token_ids) // window
    return begin_with(token_ids[: count * window].view(count, window)[:max_windows], start)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> Tensor:
    """Returns (tokens,) int64 of the whole text, or of a beginning with at least `needed` tokens."""
    if needed is not None and len(text) > (enough := needed * CHARACTERS_PER_TOKEN):
        # A held-out text can have gigabytes, and only its first windows are used.
        token_ids = tokenize(text[:enough], tokenizer, None)
        if len(token_ids) > needed:
            return token_ids
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _check_length(token_ids: Tensor, window: int) -> None:
    if len(token_ids) < window:
        raise UserError(f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}")


def fixed_batches(windows: Tensor, batch_size: int) -> list[Batch]:
    """Batches separate windows (count, window), with window − 1 predictions each."""
    return [Batch(rows, windows.shape[1] - 1) for rows in windows.split(batch_size)]


def sliding_batches(
    token_ids: Tensor, window: int, stride: int, max_windows: int | None, batch_size: int
) -> list[Batch]:
    """Batches windows of token_ids (tokens,) that begin every `stride` < `window` tokens.

    The first window predicts all its tokens but one. Each later window predicts only the tokens that no earlier window
    held, with at least window − stride tokens before each. The last window ends with the text and may be shorter.
    """
    _check_length(token_ids, window)
    rows = token_ids.unfold(0, window, stride)[:max_windows]
    batches = [Batch(rows[:1], window - 1)]
    batches += [Batch(later, stride) for later in rows[1:].split(batch_size) if len(later)]
    end = (len(rows) - 1) * stride + window
    if len(rows) != max_windows and end < len(token_ids):
        batches.append(Batch(token_ids[None, len(rows) * stride :], len(token_ids) - end))
    return batches


@torch.no_grad()
def measure_perplexity(
    losses: Losses, batches: list[Batch], comm: "Communicator", progress: Progress = lambda rounds, _: rounds
) -> Perplexity:
    """Measures the batches, dealt out to the ranks in turn. The result is the same on any number of ranks. Collective.

    A sharded model gathers its weights in `losses`, so a rank without a batch left repeats the first one, uncounted.
    """
    total = torch.zeros(1, dtype=torch.float64, device=comm.device)
    for round_start in progress(range(0, len(batches), comm.world_size), "perplexity"):
        mine = round_start + comm.rank
        batch = batches[mine if mine < len(batches) else 0]
        loss = losses(batch.input_ids.to(comm.device), batch.labels.to(comm.device)).double().sum()
        if mine < len(batches):
            total += loss
    tokens = sum(len(batch.input_ids) * batch.predicted for batch in batches)
    perplexity = exp_of_mean(comm.all_reduce(total).item(), tokens)
    return Perplexity(perplexity, tokens, sum(len(batch.input_ids) for batch in batches))


def exp_of_mean(loss: float, tokens: int) -> float:
    """Returns the perplexity of a summed loss. NaN stays NaN."""
    mean = loss / tokens
    return math.inf if mean > 700 else math.exp(mean)  # a float holds no more
