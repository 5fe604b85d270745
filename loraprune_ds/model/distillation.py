"""Token losses that pull towards the dense model, chunk by chunk.

A loss is (1 − w) · cross-entropy + w · T² · KL(teacher ‖ student). Within the KL the logits of both are divided by T
(Hinton et al., arXiv 1503.02531). The teacher is the dense model. Its outputs are kept for the supervised tokens of a
batch, in the order of the rows. They are one of two:
  hidden states   the final ones. The head is never cut, so it computes exactly the same logits again.
  top logits      the k largest, divided by T, as log-probabilities. The mass of all others is compared as one event.
Both give the same gradient by the student's logits z:
(1 − w) · (softmax(z) − label) + w · T · (softmax(z / T) − target).
With top logits only the mass of the rest is known. Then the target spreads it over the rest as the student does.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraprune_ds.errors import UserError
from loraprune_ds.model.logits import Head

LOGITS_AT_ONCE = 1 << 26  # fp32 elements: 256 MiB. These are rows enough to keep a GPU's matrix units busy
BUFFERS = 4  # of a chunk's logits, at the widest place of a distilled loss
SAMPLES_PER_FILE = 64
FILE_BYTES = 1 << 27  # a rank holds one file's content while it makes it


@dataclass(frozen=True)
class HiddenTeacher:
    """Holds final hidden states: (tokens, hidden_size)."""

    hidden: Tensor


@dataclass(frozen=True)
class TopTeacher:
    """Holds the k largest logits, divided by the temperature: log_probs (tokens, k) fp32 and ids (tokens, k) int64.

    rest (tokens,) fp32 is the mass of all other ids.
    """

    log_probs: Tensor
    ids: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Distillation:
    """Holds what a loss is mixed with. `weight` is w, in (0, 1], and `temperature` is T, above 0."""

    teacher: HiddenTeacher | TopTeacher
    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Recording:
    """Asks for the fields of a teacher instead of losses. `top_k` is None for its hidden states.

    Those do not depend on the temperature.
    """

    top_k: int | None
    temperature: float = 1.0


def chunk_size(vocab_size: int, given: int | None = None, *, buffers: int = BUFFERS) -> int:
    """Returns how many tokens' logits are held at once. Without `given` all buffers together have LOGITS_AT_ONCE."""
    return given or max(1, LOGITS_AT_ONCE // (buffers * vocab_size))


def rows_at_once(head: Head, given: int | None, *, buffers: int = BUFFERS) -> int:
    """Returns the `chunk_size` of a loss that may be differentiated. It is half of that if fp32 logits are capped.

    The slope of a cap is computed from its logits. They are one more tensor beside the probabilities. In 16 bits they
    fit where other tensors are rounded later.
    """
    chunk = chunk_size(len(head.weight), given, buffers=buffers)
    is_larger = head.transform.softcap is not None and head.weight.dtype == torch.float32
    return max(1, chunk // 2) if is_larger else chunk


def token_bytes(top_k: int | None, hidden_size: int, element_size: int) -> int:
    """Returns the bytes on disk of one supervised token: its hidden states, or k fp32, k int32 and one fp32."""
    return hidden_size * element_size if top_k is None else top_k * 8 + 4


def samples_per_file(sample_bytes: int) -> int:
    """Returns the samples in one file of a teacher, if the largest has `sample_bytes`."""
    return max(1, min(SAMPLES_PER_FILE, FILE_BYTES // max(1, sample_bytes)))


def check_top_k(top_k: int | None, vocab_size: int) -> None:
    """Checks that a token has at least `top_k` logits.

    Raises:
        UserError: it has fewer.
    """
    if top_k is not None and top_k > vocab_size:
        raise UserError(f"train.distill_top_k {top_k} is above the model's vocabulary of {vocab_size}")


@torch.no_grad()
def record(hidden: Tensor, head: Head, recording: Recording, chunk_tokens: int | None = None) -> dict[str, Tensor]:
    """Returns the fields of a teacher, from its (tokens, hidden_size) and the head."""
    if recording.top_k is None:
        return {"hidden": hidden}
    parts = []
    for rows in hidden.split(chunk_size(len(head.weight), chunk_tokens)):
        log_probs = _log_probs(head, rows, recording.temperature)
        values, ids = log_probs.topk(recording.top_k, dim=1)
        parts.append((values, ids, log_probs.exp_().scatter_(1, ids, 0).sum(1)))
    log_probs, ids, rest = (torch.cat(fields) for fields in zip(*parts, strict=True))
    return {"log_probs": log_probs, "ids": ids, "rest": rest}


def distilled_losses(
    hidden: Tensor, head: Head, labels: Tensor, distillation: Distillation, chunk_tokens: int | None = None
) -> Tensor:
    """Returns (tokens,) fp32. It can be differentiated by `hidden`, once. The head is frozen.

    Args:
        hidden: (tokens, hidden_size) of supervised tokens.
        labels: (tokens,).
        chunk_tokens: as `chunk_size` takes it.
    """
    differentiate = torch.is_grad_enabled() and hidden.requires_grad
    chunk = rows_at_once(head, chunk_tokens)
    losses: Any = _DistilledLosses.apply(hidden, head, labels, distillation, chunk, differentiate)
    return losses


class _DistilledLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        distillation: Distillation,
        chunk: int,
        differentiate: bool,
    ) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if differentiate else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            into = None if gradient is None else gradient[rows]
            losses[rows] = _chunk_losses(hidden[rows], head, labels[rows, None], distillation, rows, into)
        ctx.save_for_backward(gradient)
        ctx.transform = head.transform
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream = ctx.transform.unscale(gradients[0])
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None, None


def _chunk_losses(
    hidden: Tensor, head: Head, labels: Tensor, distillation: Distillation, rows: slice, gradient: Tensor | None
) -> Tensor:
    """Returns the losses (tokens,) of a chunk. Writes their gradient by `hidden` into `gradient`, if there is one.

    Args:
        hidden: (tokens, hidden_size).
        labels: (tokens, 1).
        rows: of the teacher.
    """
    w, temperature, transform = distillation.weight, distillation.temperature, head.transform
    logits = head.logits(hidden).float()
    log_probs = logits.log_softmax(1)
    # What turns log_probs into logits again. A cap's slope is computed from these, and they are not kept.
    total = None if transform.softcap is None else logits[:, :1] - log_probs[:, :1]
    del logits
    softened = log_probs if temperature == 1 else (log_probs / temperature).log_softmax(1)
    target, divergence = _target(distillation, rows, head, softened)
    losses = w * temperature**2 * divergence - (1 - w) * log_probs.gather(1, labels)[:, 0]
    if gradient is not None:
        slope = log_probs.exp_() if total is None else log_probs.exp()
        if temperature != 1:  # else both are one
            slope.mul_(1 - w).add_(softened.exp_(), alpha=w * temperature)
        slope.sub_(target, alpha=w * temperature)
        slope.scatter_add_(1, labels, torch.full_like(slope[:, :1], w - 1))
        if total is not None:
            transform.uncap_(slope, log_probs.add_(total))
        del log_probs, softened, target  # before the slope is rounded
        gradient.copy_(slope.to(head.weight.dtype) @ head.weight)
    return losses


def _log_probs(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """Returns log softmax(z / T), (tokens, vocabulary) fp32, of logits z."""
    logits = head.logits(hidden).float()
    return (logits if temperature == 1 else logits.div_(temperature)).log_softmax(1)


def _target(distillation: Distillation, rows: slice, head: Head, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the target of the student (tokens, vocabulary) and KL(teacher ‖ student) (tokens,), both fp32.

    Args:
        log_probs: the student's, at the temperature.
    """
    teacher = distillation.teacher
    if isinstance(teacher, HiddenTeacher):
        expected = _log_probs(head, teacher.hidden[rows], distillation.temperature)
        target = expected.exp()
        return target, expected.sub_(log_probs).mul_(target).sum(1)
    known, ids, rest = teacher.log_probs[rows], teacher.ids[rows], teacher.rest[rows]
    target = log_probs.exp().scatter_(1, ids, 0)
    others = target.sum(1).clamp_min(torch.finfo(torch.float32).tiny)  # the student's mass of the rest
    divergence = (known.exp() * (known - log_probs.gather(1, ids))).sum(1)
    divergence += torch.xlogy(rest, rest) - torch.xlogy(rest, others)
    target.mul_((rest / others)[:, None]).scatter_(1, ids, known.exp())
    return target, divergence
