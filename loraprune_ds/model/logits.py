"""The logits of a causal LM, and the token losses of one chunk, with distillation from the dense model.

Some families scale or cap the product of the head. A distilled loss is
(1 − w) · cross-entropy + w · T² · KL(teacher ‖ student). Within the KL the logits of both are divided by T
(Hinton et al., arXiv 1503.02531). The teacher is the dense model. The head is never cut, so the teacher's
logits come from its final hidden states and the student's head. The gradient with respect to the student's logits z is
(1 − w) · (softmax(z) − label) + w · T · (softmax(z / T) − softmax(teacher's logits / T)).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.errors import require
from loraprune_ds.model.family import FAMILIES, family_name

LOGITS_AT_ONCE = 1 << 26  # fp32 elements: 256 MiB, enough rows to keep a GPU's matrix units busy
BUFFERS = 4  # copies of a chunk's logits at the peak of a distilled loss


@dataclass(frozen=True)
class LogitsTransform:
    scale: float | None = None
    divisor: float | None = None
    softcap: float | None = None  # c of c · tanh(logits / c), applied last

    def apply_(self, product: Tensor) -> Tensor:
        """Turns the head's product into logits, in place and with the same rounding as transformers' models."""
        if self.divisor is not None:
            product.div_(self.divisor)
        if self.scale is not None:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def uncap_(self, gradient: Tensor, logits: Tensor) -> None:
        """Multiplies a gradient by the cap's slope 1 - (logits / c)², in place. Overwrites `logits` to save memory."""
        if self.softcap is not None:
            gradient.addcmul_(gradient, logits.div_(self.softcap).square_(), value=-1)

    def unscale(self, gradient: Tensor) -> Tensor:
        """Multiplies a gradient (or a sum of gradients) by the slope of factor and divisor."""
        if self.divisor is not None:
            gradient = gradient / self.divisor
        return gradient if self.scale is None else gradient * self.scale


@dataclass(frozen=True, eq=False)
class Head:
    """Computes logits from final hidden states. It is frozen."""

    weight: Tensor  # (vocabulary, hidden_size), gathered
    transform: LogitsTransform

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps (tokens, hidden_size) to (tokens, vocabulary), as the stock model does, in its dtype."""
        return self.transform.apply_(hidden @ self.weight.t())

    def chunk(self, distillation: "Distillation | None") -> int:
        """Returns the tokens of a chunk of a loss that may be differentiated."""
        # A cap's slope is computed from the logits. fp32 logits are one more buffer. 16-bit logits reuse a later one.
        buffers = 1 if distillation is None else BUFFERS
        chunk = chunk_size(len(self.weight), buffers=buffers)
        is_larger = self.transform.softcap is not None and self.weight.dtype == torch.float32
        return max(1, chunk // 2) if is_larger else chunk


def logits_transform(config: Any) -> LogitsTransform:
    """Reads the transform from transformers' config object, which has all defaults."""
    family = FAMILIES[family_name(config.model_type)]

    return LogitsTransform(
        scale=_factor(config, family.logit_scale),
        divisor=_factor(config, family.logit_divisor),
        softcap=_number(config, family.softcap),
    )


def _number(config: Any, field: str | None) -> float | None:
    value = None if field is None else getattr(config, field)
    return None if value is None else float(value)


def _factor(config: Any, field: str | None) -> float | None:
    """Returns a number of the config, or None if it is 1 and changes nothing."""
    value = _number(config, field)
    return None if value == 1 else value


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Returns the head of a causal LM. Refuses a bias, which the losses would not add."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    require(
        head.bias is None,
        f"{type(model).__name__}: lm_head has a bias; such heads are not supported",
    )
    return head


@dataclass(frozen=True)
class Distillation:
    teacher: Tensor  # its final hidden states (tokens, hidden_size)
    weight: float  # w, in (0, 1]
    temperature: float = 1.0  # T, above 0


def chunk_size(vocab_size: int, *, buffers: int = BUFFERS) -> int:
    """Returns the tokens whose logits are in memory together. `buffers` of them have LOGITS_AT_ONCE elements."""
    return max(1, LOGITS_AT_ONCE // (buffers * vocab_size))


def chunk_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    gradient: Tensor | None,
    distillation: Distillation | None,
    rows: slice,
) -> Tensor:
    """Returns the losses (tokens,) of a chunk with labels (tokens, 1), and writes their gradient into `gradient`."""
    if distillation is None:
        return _cross_entropies(hidden, head, labels, gradient)
    return _distilled_losses(hidden, head, labels, gradient, distillation, rows)


def _cross_entropies(hidden: Tensor, head: Head, labels: Tensor, gradient: Tensor | None) -> Tensor:
    # The slope of a cap is computed from the logits.
    keeps_logits = gradient is not None and head.transform.softcap is not None
    logits = head.logits(hidden)
    probabilities = logits.to(torch.float32, copy=keeps_logits)
    largest = probabilities.amax(1, keepdim=True)
    label_logits = probabilities.gather(1, labels)
    exponentials = probabilities.sub_(largest).exp_()
    total = exponentials.sum(1, keepdim=True)
    exponentials.div_(total)
    if gradient is not None:
        probabilities.scatter_add_(1, labels, torch.full_like(label_logits, -1))
        head.transform.uncap_(probabilities, logits)
        del logits  # before the gradient is rounded
        gradient.copy_(probabilities.to(head.weight.dtype) @ head.weight)
    return (total.log() + largest - label_logits)[:, 0]


def _distilled_losses(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    gradient: Tensor | None,
    distillation: Distillation,
    rows: slice,
) -> Tensor:
    w = distillation.weight
    temperature = distillation.temperature
    transform = head.transform
    logits = head.logits(hidden).float()
    log_probs = logits.log_softmax(1)
    # Logits minus log_probs. The slope of a cap needs the logits, which are not kept.
    total = None if transform.softcap is None else logits[:, :1] - log_probs[:, :1]
    del logits
    softened = log_probs
    if temperature != 1:
        softened = (log_probs / temperature).log_softmax(1)
    divergence, target = _divergence(softened, head, distillation.teacher[rows], temperature)
    cross_entropies = log_probs.gather(1, labels)[:, 0].neg()
    losses = w * temperature**2 * divergence + (1 - w) * cross_entropies
    if gradient is not None:
        slope = log_probs.exp_() if total is None else log_probs.exp()
        if temperature != 1:  # at 1 the two softmaxes are equal and their weights sum to 1
            slope.mul_(1 - w).add_(softened.exp_(), alpha=w * temperature)
        slope.sub_(target, alpha=w * temperature)
        slope.scatter_add_(1, labels, torch.full_like(slope[:, :1], w - 1))
        if total is not None:
            transform.uncap_(slope, log_probs.add_(total))
        del log_probs, softened, target  # before the slope is rounded
        gradient.copy_(slope.to(head.weight.dtype) @ head.weight)
    return losses


def _divergence(
    softened: Tensor, head: Head, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns KL(teacher ‖ student) of each token, and the teacher's probabilities."""
    logits = head.logits(teacher).float()
    if temperature != 1:
        logits.div_(temperature)
    log_probs = logits.log_softmax(1)
    del logits
    target = log_probs.exp()
    return log_probs.sub_(softened).mul_(target).sum(1), target
