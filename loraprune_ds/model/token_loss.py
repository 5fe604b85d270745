"""Cross-entropy of every token, a chunk of tokens at a time. The logits of a whole batch are never held.

With a vocabulary of 128,000 and 4,096 tokens the fp32 logits alone are 2 GB. Their gradient is as large. Here the head
computes logits chunk by chunk. While a chunk is there, it also computes the gradient of each loss by its hidden state.
Backward only scales that. So logits are computed once, and the frozen head is gathered once.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loraprune_ds.model.attention import attn_implementation
from loraprune_ds.model.classes import build_on_meta, hold_frozen, refused_in_one_line
from loraprune_ds.model.distillation import Distillation, Recording, distilled_losses, record, rows_at_once
from loraprune_ds.model.logits import Head, LogitsTransform, logits_transform, output_head
from loraprune_ds.model.pretrained import PretrainedModel

IGNORE_INDEX = -100  # a label that is not supervised, as in torch's cross_entropy


def supervised_positions(labels: Tensor) -> Tensor:
    """Returns (tokens,) int64, ascending: the flat positions in (batch, window) whose next token is supervised.

    On a device it waits for that. So a caller that has the labels on the host asks there, and hands the result on.
    """
    is_supervised = torch.zeros_like(labels, dtype=torch.bool)
    is_supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return is_supervised.flatten().nonzero().flatten()


def token_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    chunk_tokens: int | None = None,
    distillation: Distillation | None = None,
    supervised: Tensor | None = None,
) -> Tensor:
    """Returns next-token cross-entropies in fp32, (batch, window - 1). 0 where a token is not supervised.

    Only supervised tokens reach the head. They can be differentiated by `hidden`, once. The head is frozen.

    Args:
        hidden: (batch, window, hidden_size) from the decoder's last norm.
        labels: (batch, window), IGNORE_INDEX where a token is not supervised. Position t predicts label t + 1.
        chunk_tokens: as `chunk_size` takes it.
        distillation: what the cross-entropies are mixed with.
        supervised: `supervised_positions` of the labels, if they are known already.
    """
    positions = supervised_positions(labels) if supervised is None else supervised
    rows, wanted = hidden.flatten(0, 1).index_select(0, positions), labels.flatten().index_select(0, positions + 1)
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    assert not (differentiate and head.weight.requires_grad), "the head is frozen: no gradient of it is computed"
    losses: Any
    if distillation is None:
        chunk = rows_at_once(head, chunk_tokens, buffers=1)
        losses = _ChunkedLosses.apply(rows, head, wanted, chunk, differentiate)
    else:
        losses = distilled_losses(rows, head, wanted, distillation, chunk_tokens)
    batch, window = labels.shape
    every = torch.zeros(batch * (window - 1), dtype=torch.float32, device=hidden.device)
    return every.index_copy(0, positions - positions // window, losses).view(batch, window - 1)


class _ChunkedLosses(torch.autograd.Function):
    """Maps hidden states (tokens, hidden_size) and labels (tokens,) to losses (tokens,) fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, chunk: int, differentiate: bool) -> Tensor:
        weight, transform = head.weight, head.transform
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiate else None
        keep = differentiate and transform.softcap is not None  # the slope of a cap is computed from its logits
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits: Tensor | None = head.logits(hidden[rows])
            probabilities = logits.to(torch.float32, copy=keep)
            if not keep:
                logits = None  # before the softmax needs room
            losses[rows] = _softmax_(probabilities, labels[rows, None])
            if gradient is not None:
                probabilities.scatter_add_(1, labels[rows, None], torch.full_like(probabilities[:, :1], -1))
                if logits is not None:
                    transform.uncap_(probabilities, logits)
                    logits = None
                gradient[rows] = probabilities.to(weight.dtype) @ weight
            del probabilities  # before the next chunk's are made
        ctx.save_for_backward(gradient)
        ctx.transform = transform
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream = ctx.transform.unscale(gradients[0])
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


def _softmax_(logits: Tensor, labels: Tensor) -> Tensor:
    """Turns fp32 logits (tokens, vocabulary) into probabilities, in place. Returns cross-entropies (tokens,)."""
    largest = logits.amax(1, keepdim=True)
    label_logits = logits.gather(1, labels)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(1, keepdim=True)
    exponentials.div_(total)
    return (total.log() + largest - label_logits)[:, 0]


class LossHead(nn.Linear):
    """A head that gives token losses if it is told the labels, logits otherwise.

    The loss is computed inside this module's forward. Only there ZeRO-3 has its weight gathered.
    """

    def __init__(self, head: nn.Linear, transform: LogitsTransform, chunk_tokens: int | None) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the same parameter, which may be the embedding's
        self.transform = transform
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | Recording | None = None,
        supervised: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        if labels is None:
            return super().forward(input)  # the stock forward transforms them
        head = Head(self.weight, self.transform)
        if isinstance(distillation, Recording):
            rows = input.flatten(0, 1).index_select(0, supervised_positions(labels))
            return record(rows, head, distillation, self.chunk_tokens)
        return token_losses(input, head, labels, self.chunk_tokens, distillation, supervised)


class TokenLosses:
    """A base class to put before a stock causal LM. Its forward gives token losses if it is told the labels."""

    model: nn.Module
    lm_head: nn.Module

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | Recording | None = None,
        supervised: Tensor | None = None,
        position_ids: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Returns losses (batch, window - 1) fp32 for labels (batch, window). Without labels it is the stock forward.

        A text begins where `position_ids` (batch, window) do not go on. Attention does not reach beyond it.

        With a `Recording` it returns the fields of a teacher for the supervised tokens (distillation.py).
        """
        if labels is None:
            settings["position_ids"] = position_ids
            return super().forward(input_ids=input_ids, **settings)  # type: ignore[misc]  # the stock model's
        decoded = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return self.lm_head(decoded.last_hidden_state, labels, distillation, supervised)


def with_token_losses(model: PreTrainedModel, chunk_tokens: int | None = None) -> PreTrainedModel:
    """Makes `model(input_ids=…, labels=…)` give token losses. Parameters and their names stay.

    Raises:
        UserError: its head has a bias.
    """
    model.lm_head = LossHead(output_head(model), logits_transform(model.config), chunk_tokens)
    stock = type(model)
    model.__class__ = type(stock.__name__, (TokenLosses, stock), {"__module__": __name__})
    return model


def build_for_losses(pretrained: PretrainedModel, attention: str) -> PreTrainedModel:
    """Builds a pretrained model's modules without weights (classes.build_on_meta).

    Told the labels, the model gives token losses.

    Args:
        attention: `model.attn_implementation`. Some families get another one (attention.py).

    Raises:
        UserError: transformers refuses config.json or this attention implementation, or the head has a bias.
    """
    used = attn_implementation(attention, pretrained.shape.family)
    with refused_in_one_line(f"{pretrained.folder}, model.attn_implementation {attention}"):
        model = with_token_losses(build_on_meta(pretrained.config, used))
    hold_frozen(model, pretrained.shape)
    return model
