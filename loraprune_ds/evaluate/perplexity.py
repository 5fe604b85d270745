"""Perplexity of a text, which is tokenised once, on windows side by side.

The tokenizer adds its special tokens once, at the start of the text. A Gemma predicts badly without BOS, so BOS
replaces the first token of each of its windows, which no window predicts. llama.cpp measures the same way. Negative
log-likelihoods are summed in float64 over all ranks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import require
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


def split_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, window: int, max_windows: int | None, start: int | None = None
) -> Tensor:
    """Returns (windows, window) int64, side by side. The tail that fills no window is dropped.

    Args:
        start: the first id of every window (tokenizer.window_start). None: the text's own.
    """
    token_ids = tokenize(text, tokenizer, None if max_windows is None else max_windows * window)
    few = f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}"
    require(len(token_ids) >= window, few)
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


@torch.no_grad()
def measure_perplexity(
    losses: Losses, batches: Sequence[Tensor], comm: "Communicator", progress: Progress = lambda rounds, _: rounds
) -> Perplexity:
    """Measures the batches, dealt out to the ranks in turn. The result is the same on any number of ranks. Collective.

    A sharded model gathers its weights in `losses`, so a rank without a batch left repeats the first one, uncounted.

    Args:
        batches: windows of token ids, (rows, length) each. All tokens but the first of a window are predicted.
    """
    total = torch.zeros(1, dtype=torch.float64, device=comm.device)
    for round_start in progress(range(0, len(batches), comm.world_size), "perplexity"):
        mine = round_start + comm.rank
        ids = batches[mine if mine < len(batches) else 0].to(comm.device)
        loss = losses(ids, ids).double().sum()
        if mine < len(batches):
            total += loss
    tokens = sum(ids[:, 1:].numel() for ids in batches)
    perplexity = exp_of_mean(comm.all_reduce(total).item(), tokens)
    return Perplexity(perplexity, tokens, sum(map(len, batches)))


def exp_of_mean(loss: float, tokens: int) -> float:
    """Returns the perplexity of a summed loss. NaN stays NaN."""
    mean = loss / tokens
    return math.inf if mean > 700 else math.exp(mean)  # a float holds no more
