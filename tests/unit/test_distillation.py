"""The distilled loss and its gradient against autograd in fp64, and the recorded fields of a teacher."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.model.logits import Distillation, Head, HiddenTeacher, LogitsTransform, Recording, TopTeacher, record
from loraprune_ds.model.token_loss import chunked_losses

TOKENS, HIDDEN, VOCABULARY = 23, 8, 37
# fp32 against fp64. Losses are about 4, gradients about 1, each from sums of 37 terms.
TOLERANCE = 2e-6
NONE = LogitsTransform()
TRANSFORMS = [NONE, LogitsTransform(scale=0.7), LogitsTransform(divisor=1.5), LogitsTransform(softcap=2.0)]


def made_up() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the student's and the teacher's hidden states, the head and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator) / HIDDEN**0.5
    return student, teacher, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Returns (tokens, vocabulary) fp64."""
    logits = hidden.double() @ head.weight.double().T * (head.transform.scale or 1) / (head.transform.divisor or 1)
    return logits if (cap := head.transform.softcap) is None else cap * torch.tanh(logits / cap)


def dense(student: Tensor, teacher: Tensor, head: Head, labels: Tensor, w: float, k: int | None, t: float) -> Tensor:
    """Returns (tokens,) fp64 by the definition. With k the other ids are one event."""
    hard = cross_entropy(logits_of(student, head), labels, reduction="none")
    ours, theirs = (torch.log_softmax(logits_of(hidden, head) / t, 1) for hidden in (student, teacher))
    if k is None:
        divergence = (theirs.exp() * (theirs - ours)).sum(1)
    else:
        top = theirs.topk(k, 1).indices
        rest = torch.ones_like(theirs, dtype=torch.bool).scatter_(1, top, False)

        def events(log_probs: Tensor) -> Tensor:
            others = log_probs.masked_fill(~rest, -torch.inf).logsumexp(1, keepdim=True)
            return torch.cat([log_probs.gather(1, top), others], 1)

        divergence = (events(theirs).exp() * (events(theirs) - events(ours))).sum(1)
    return (1 - w) * hard + w * t**2 * divergence


def teacher_of(hidden: Tensor, head: Head, k: int | None, temperature: float) -> HiddenTeacher | TopTeacher:
    fields = record(hidden, head, Recording(k, temperature), chunk_tokens=5)
    return HiddenTeacher(**fields) if k is None else TopTeacher(**fields)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("k", [None, 1, 5, VOCABULARY - 1])
@pytest.mark.parametrize("w", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1, 0.5, 2])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_loss_and_gradient_are_autograds(
    transform: LogitsTransform, temperature: float, w: float, k: int | None, chunk: int | None
) -> None:
    student, teacher, weight, labels = made_up()
    head, weights = Head(weight, transform), torch.linspace(0.1, 1, TOKENS)
    student.requires_grad_()
    given = Distillation(teacher_of(teacher, head, k, temperature), w, temperature)
    losses = chunked_losses(student, head, labels, chunk, given)
    (losses * weights).sum().backward()
    reference = student.detach().double().requires_grad_()
    expected = dense(reference, teacher, head, labels, w, k, temperature)
    (expected * weights).sum().backward()
    tolerance = TOLERANCE * max(1, temperature**2)  # the divergence is multiplied by the square of the temperature
    assert (losses - expected).abs().max() < tolerance
    assert student.grad is not None
    assert reference.grad is not None
    assert (student.grad - reference.grad).abs().max() < tolerance
