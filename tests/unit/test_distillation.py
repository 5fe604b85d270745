"""The distilled loss and its gradient against autograd in fp64, by the definition."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.model.logits import Distillation, Head, LogitsTransform
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


def dense(student: Tensor, teacher: Tensor, head: Head, labels: Tensor, w: float, t: float) -> Tensor:
    """Returns (tokens,) fp64 by the definition."""
    hard = cross_entropy(logits_of(student, head), labels, reduction="none")
    ours, theirs = (torch.log_softmax(logits_of(hidden, head) / t, 1) for hidden in (student, teacher))
    divergence = (theirs.exp() * (theirs - ours)).sum(1)
    return (1 - w) * hard + w * t**2 * divergence


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("w", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1, 0.5, 2])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_autograd_gives_the_same(transform: LogitsTransform, temperature: float, w: float, chunk: int | None) -> None:
    student, teacher, weight, labels = made_up()
    head, weights = Head(weight, transform), torch.linspace(0.1, 1, TOKENS)
    student.requires_grad_()
    given = Distillation(teacher, w, temperature)
    losses = chunked_losses(student, head, labels, chunk, given)
    (losses * weights).sum().backward()
    reference = student.detach().double().requires_grad_()
    expected = dense(reference, teacher, head, labels, w, temperature)
    (expected * weights).sum().backward()
    tolerance = TOLERANCE * max(1, temperature**2)  # the divergence is multiplied by the square of the temperature
    assert (losses - expected).abs().max() < tolerance
    assert student.grad is not None
    assert reference.grad is not None
    assert (student.grad - reference.grad).abs().max() < tolerance
