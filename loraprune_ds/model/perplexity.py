"""Perplexity of a text in adjacent windows, or of targets given their sources.

The text is tokenised once, so special tokens stand only at its start. A Gemma predicts badly without BOS, so BOS
replaces the first token of each window, which is never predicted. llama.cpp measures the same way. Negative
log-likelihoods are summed in float64 over all ranks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.ranks.comm import Communicator

# input_ids and labels, both (rows, length). Tokens with the label IGNORE_INDEX are not predicted
Labelled = tuple[Tensor, Tensor]
# (input_ids, labels), both (batch, length) -> fp32 token losses (batch, length - 1), 0 where the label is IGNORE_INDEX
Losses = Callable[[Tensor, Tensor], Tensor]
# Wraps the rounds of a loop to show its progress. Takes the rounds and a word for the work.
Progress = Callable[[Iterable[int], str], Iterable[int]]


@dataclass(frozen=True)
class Perplexity:
    """The exponential of the mean negative log-likelihood, over `tokens` predictions in `windows` windows or pairs."""

    perplexity: float
    tokens: int
    windows: int


@torch.no_grad()
def measure_perplexity(
    losses: Losses,
    batches: Sequence[Labelled],
    ranks: Communicator,
    progress: Progress = lambda rounds, _: rounds,
) -> Perplexity:
    """Measures the batches, dealt to the ranks in turn. The result does not depend on the number of ranks. Collective.

    A sharded model gathers its weights in `losses`, so every rank must call it in each round. A rank without a batch
    repeats the first one, uncounted.

    Args:
        batches: of windows. The first token of a window is never predicted.
    """
    total = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    for round_start in progress(range(0, len(batches), ranks.world_size), "perplexity"):
        mine = round_start + ranks.rank
        has_batch = mine < len(batches)
        ids, labels = batches[mine if has_batch else 0]
        loss = losses(ids.to(ranks.device), labels.to(ranks.device)).double().sum()
        if has_batch:
            total += loss
    tokens = sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels in batches)
    mean = ranks.all_reduce(total).item() / tokens
    # exp of a larger number overflows a float. NaN stays NaN.
    perplexity = math.inf if mean > 700 else math.exp(mean)
    windows = sum(len(ids) for ids, _ in batches)
    return Perplexity(perplexity, tokens, windows)
