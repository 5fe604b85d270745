"""The loss of a step: a sum over the supervised tokens of the global batch, divided by their number."""

from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.train.data import IGNORE_INDEX


def token_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of next-token cross-entropies in fp32: a scalar.

    Args:
        logits: (batch, window, vocabulary).
        labels: (batch, window), IGNORE_INDEX where a token is not supervised; position t predicts label t + 1.
    """
    shifted = labels[:, 1:].reshape(-1)
    predictions = logits[:, :-1].reshape(len(shifted), -1)
    return cross_entropy(predictions.float(), shifted, ignore_index=IGNORE_INDEX, reduction="sum")
