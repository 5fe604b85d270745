"""How close a pruned model's next-token probabilities q are to those of the dense model, p, on texts.

The overlap is the mean of Σ min(p, q). Speculative sampling accepts this share of the tokens that q drafts for p
(Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraprune_ds.model.logits import Head, chunk_size, logits_transform, output_head
from loraprune_ds.model.token_loss import IGNORE_INDEX

Labelled = tuple[Tensor, Tensor]  # input_ids and labels, both (rows, length). IGNORE_INDEX: not predicted


@dataclass(frozen=True)
class Closeness:
    """Two models on a text, averaged over `predictions` tokens."""

    text: str
    agreement: float  # share of tokens where both find the same one most probable
    overlap: float
    kl: float  # KL(dense ‖ pruned), in nats
    predictions: int


@torch.no_grad()
def measure_closeness(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Iterable[Labelled], text: str
) -> Closeness:
    """Compares next-token probabilities on the labelled tokens of a text that both read as the same ids."""
    heads = [frozen_head(model) for model in (dense, pruned)]
    vocabulary = min(len(head.weight) for head in heads)  # an embedding may be padded
    total, count = torch.zeros(3, dtype=torch.float64), 0
    for input_ids, labels in batches:
        predicted = labels[:, 1:] != IGNORE_INDEX
        hidden = [last_hidden(model, input_ids)[:, :-1][predicted] for model in (dense, pruned)]
        for rows in zip(*(part.split(chunk_size(vocabulary)) for part in hidden), strict=True):
            log_p, log_q = (
                head.logits(part)[:, :vocabulary].float().log_softmax(1) for head, part in zip(heads, rows, strict=True)
            )
            p, q = log_p.exp(), log_q.exp()
            same = (p.argmax(1) == q.argmax(1)).sum()
            total += torch.stack([same, p.minimum(q).sum(), (p * (log_p - log_q)).sum()]).double().cpu()
            count += len(p)
    agreement, overlap, kl = (total / count).tolist()
    return Closeness(text, agreement, overlap, kl, count)


def last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Returns the final hidden states (batch, length, hidden_size) of ids (batch, length)."""
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def frozen_head(model: PreTrainedModel) -> Head:
    """Returns the head that makes logits of them."""
    return Head(output_head(model).weight, logits_transform(model.config))
