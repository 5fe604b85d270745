"""Token losses, computed in chunks of tokens, so the logits of a full batch are never in memory.

With a vocabulary of 128,000 and 4,096 tokens the fp32 logits alone are 2 GB, and their gradient is as large. While
the logits of a chunk exist, the forward pass also computes the gradient of each loss with respect to its hidden state.
The backward pass only scales it. So logits are computed once, and the frozen head is gathered once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from loraprune_ds.model.logits import (
    Distillation,
    Head,
    LogitsTransform,
    chunk_losses,
    logits_transform,
    output_head,
)

IGNORE_INDEX = -100  # label of an unsupervised token, as in torch's cross_entropy


def supervised_positions(labels: Tensor) -> Tensor:
    """Returns (tokens,) int64, ascending: the flat positions in (batch, window) whose next token is supervised."""
    is_supervised = torch.zeros_like(labels, dtype=torch.bool)
    is_supervised[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    return is_supervised.flatten().nonzero().flatten()


class SplitRows(NamedTuple):
    """Holds rows for an encoder, which reads the source, and its decoder, which reads start and target."""

    source: Tensor  # (batch, longest source) ids
    source_mask: Tensor  # False at padding
    target: Tensor  # (batch, longest target) ids: the start, then the target without its last token
    target_mask: Tensor
    places: Tensor  # (batch · window,) int64: where in the flat `target` each place of a row is, or is nearest


def split_rows(input_ids: Tensor, labels: Tensor) -> SplitRows:
    """Splits rows (batch, window) into sources and targets.

    The first supervised label is the target's first token; the position before it holds the decoder's start token:

        input_ids   a  b  c  START  x  y  END       source  a  b  c
        labels      -  -  -    -    x  y  END       target  START  x  y
    """
    batch, width = labels.shape
    window = torch.arange(width, device=labels.device)
    is_supervised = (labels != IGNORE_INDEX).int()
    starts = is_supervised.argmax(1, keepdim=True) - 1  # (batch, 1), where the start token is
    ends = width - 1 - is_supervised.flip(1).argmax(1, keepdim=True)  # where the last label is

    source_mask = window[: int(starts.max())] < starts
    source = input_ids[:, : source_mask.shape[1]] * source_mask

    lengths = ends - starts
    steps = window[: int(lengths.max())]
    target_mask = steps < lengths
    inside = (starts + steps).clamp(max=width - 1)
    target = input_ids.gather(1, inside) * target_mask

    rows = torch.arange(batch).to(starts)[:, None]
    steps_after_start = (window - starts).clamp(0, len(steps) - 1)
    places = rows * len(steps) + steps_after_start
    return SplitRows(source, source_mask, target, target_mask, places.flatten())


def final_hidden(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    rows: SplitRows | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Returns the hidden states (batch, window, hidden_size) that the head reads. Position t predicts label t + 1.

    Args:
        rows: `split_rows` for an encoder-decoder, if they are already known.
    """
    if not model.config.is_encoder_decoder:
        decoded = model.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        )
        return decoded.last_hidden_state
    source, source_mask, target, _, places = rows or split_rows(input_ids, labels)
    encoded = model.get_encoder()(input_ids=source, attention_mask=source_mask).last_hidden_state
    decoded = model.get_decoder()(
        input_ids=target,
        encoder_hidden_states=encoded,
        encoder_attention_mask=source_mask,
        use_cache=False,
    ).last_hidden_state
    if getattr(model.config, "scale_decoder_outputs", False):
        # To scale the logits instead would round differently in 16 bits.
        decoded = decoded * model.config.d_model**-0.5
    return decoded.flatten(0, 1).index_select(0, places).view(*input_ids.shape, -1)


def token_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    distillation: Distillation | None = None,
    supervised: Tensor | None = None,
) -> Tensor:
    """Returns next-token losses in fp32, (batch, window - 1), with 0 for unsupervised tokens.

    They can be differentiated with respect to `hidden`, once. The head is frozen, and only supervised tokens reach it.

    Args:
        hidden: (batch, window, hidden_size) from the decoder's last norm.
        labels: (batch, window), IGNORE_INDEX for unsupervised tokens. Position t predicts label t + 1.
        distillation: mixes the cross-entropies with a divergence from a teacher.
        supervised: `supervised_positions` of the labels, if they are already known.
    """
    positions = supervised_positions(labels) if supervised is None else supervised
    rows = hidden.flatten(0, 1).index_select(0, positions)
    next_labels = labels.flatten().index_select(0, positions + 1)
    differentiate = torch.is_grad_enabled() and rows.requires_grad
    assert not (differentiate and head.weight.requires_grad), (
        "the head is frozen, so it gets no gradient"
    )
    losses: Any = _ChunkedLosses.apply(rows, head, next_labels, distillation, differentiate)
    batch, window = labels.shape
    flat = torch.zeros(batch * (window - 1), dtype=torch.float32, device=hidden.device)
    flat = flat.index_copy(0, positions - positions // window, losses)
    return flat.view(batch, window - 1)


class _ChunkedLosses(torch.autograd.Function):
    """Computes `token_losses` of supervised tokens, from hidden states (tokens, hidden_size) and labels (tokens,)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        distillation: Distillation | None,
        differentiate: bool,
    ) -> Tensor:
        chunk = head.chunk(distillation)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiate else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            gradient_rows = None if gradient is None else gradient[rows]
            losses[rows] = chunk_losses(
                hidden[rows], head, labels[rows, None], gradient_rows, distillation, rows
            )
        ctx.save_for_backward(gradient)
        ctx.transform = head.transform
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream = ctx.transform.unscale(gradients[0])
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


class LossHead(nn.Linear):
    """A head that returns token losses for labels. ZeRO-3 gathers its weight only within this forward."""

    transform: LogitsTransform

    def forward(
        self,
        input: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | None = None,
        supervised: Tensor | None = None,
    ) -> Tensor:
        if labels is None:
            return super().forward(input)  # the stock model's forward transforms the logits
        head = Head(self.weight, self.transform)
        return token_losses(input, head, labels, distillation, supervised)


class TokenLosses:
    """Comes before a stock language model as a base class. Its forward returns token losses for labels."""

    lm_head: nn.Module | None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        distillation: Distillation | None = None,
        supervised: Tensor | None = None,
        position_ids: Tensor | None = None,
        rows: SplitRows | None = None,
        **settings: Any,
    ) -> Any:
        """Returns losses (batch, window - 1) fp32 for labels (batch, window). Without a head: `final_hidden`.

        A text begins where `position_ids` (batch, window) restart. Attention does not cross texts.
        """
        if labels is None:
            settings["position_ids"] = position_ids
            return super().forward(input_ids=input_ids, **settings)  # type: ignore[misc]  # the stock model's
        hidden = final_hidden(self, input_ids, labels, rows, position_ids)
        if self.lm_head is None:
            return hidden
        return self.lm_head(hidden, labels, distillation, supervised)


def with_token_losses(model: PreTrainedModel) -> PreTrainedModel:
    """Makes `model(input_ids=…, labels=…)` return token losses. Parameters keep their names."""
    head: Any = output_head(model)
    head.__class__ = LossHead
    head.transform = logits_transform(model.config)
    stock = type(model)
    model.__class__ = type(stock.__name__, (TokenLosses, stock), {"__module__": __name__})
    return model
