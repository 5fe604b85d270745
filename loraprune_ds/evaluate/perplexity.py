"""Perplexity over fixed windows: the whole text tokenised once, cut into windows, the tail dropped.

A window of n tokens gives n − 1 predictions. The negative log-likelihoods are summed in float64, over all ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError

CHARACTERS_PER_TOKEN = 32  # far more than any tokenizer reaches on prose
Forward = Callable[[Tensor], Tensor]  # input_ids (batch, window) -> logits (batch, window, vocabulary)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over `tokens` predictions in `windows` windows."""

    perplexity: float
    tokens: int
    windows: int


def cut_windows(text: str, tokenizer: PreTrainedTokenizerBase, window: int, max_windows: int | None) -> Tensor:
    """(windows, window) int64; special tokens as the tokenizer adds them, once at the start of the text.

    Raises:
        UserError: the text is shorter than one window.
    """
    if max_windows is not None and len(text) > (enough := max_windows * window * CHARACTERS_PER_TOKEN):
        text = text[:enough]  # a held-out part can be gigabytes, of which only the first windows are used
    token_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(token_ids) // window
    if count == 0:
        raise UserError(f"the evaluation text has {len(token_ids)} tokens, less than one window of {window}")
    windows = token_ids[: count * window].view(count, window)
    return windows if max_windows is None else windows[:max_windows]


@torch.no_grad()
def measure_perplexity(
    forward: Forward,
    windows: Tensor,
    batch_size: int,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
) -> Perplexity:
    """The same number on any number of ranks: each takes every W-th batch of windows.

    All ranks run `forward` equally often, since a sharded model gathers its weights in it; a rank that is out of
    windows repeats the first batch and does not count it.
    """
    batches = list(windows.split(batch_size))
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for round_start in range(0, len(batches), world_size):
        mine = round_start + rank
        batch = batches[mine if mine < len(batches) else 0].to(device)
        nll = negative_log_likelihood(forward(batch), batch)
        if mine < len(batches):
            total += nll
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(math.exp(min(sum_over_ranks(total).item() / tokens, 700.0)), tokens, windows.shape[0])


def negative_log_likelihood(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Sum over all predictions of a batch, in float64: a scalar."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for row_logits, row in zip(logits, input_ids, strict=True):  # one window at a time: fp32 logits are large
        losses = torch.nn.functional.cross_entropy(row_logits[:-1].float(), row[1:], reduction="none")
        total += losses.double().sum()
    return total
