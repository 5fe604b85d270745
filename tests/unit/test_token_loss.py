"""Token losses in chunks against torch's cross_entropy on all logits, and their memory."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from loraprune_ds.model.logits import Distillation, Head, LogitsTransform
from loraprune_ds.model.token_loss import IGNORE_INDEX, token_losses
from tests.support.tolerances import worst

BATCH, WINDOW, HIDDEN, VOCAB = 3, 17, 24, 131
NONE = LogitsTransform()
TRANSFORMS = [
    NONE,
    LogitsTransform(scale=0.7),
    LogitsTransform(divisor=1.5),
    LogitsTransform(softcap=4.0),
]
CHUNKS = [1, 5, 16, 48, None]


def in_chunks(patch: pytest.MonkeyPatch, tokens: int | None) -> None:
    """Makes losses take chunks of this many tokens. None: of as many as fit."""
    if tokens is not None:
        patch.setattr("loraprune_ds.model.logits.chunk_size", lambda *_, **__: tokens)


def material(
    dtype: torch.dtype = torch.float32, *, supervised: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (hidden, weight, labels). Logits spread by about 3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, WINDOW, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 3 / math.sqrt(HIDDEN)).to(dtype)
    labels = torch.randint(VOCAB, (BATCH, WINDOW), generator=generator)
    labels[torch.rand(BATCH, WINDOW, generator=generator) > supervised] = IGNORE_INDEX
    return hidden, weight, labels


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Returns (..., vocabulary) fp64, from the same numbers."""
    logits = (
        hidden.double()
        @ head.weight.double().T
        * (head.transform.scale or 1)
        / (head.transform.divisor or 1)
    )
    return logits if (cap := head.transform.softcap) is None else cap * torch.tanh(logits / cap)


def straightforward(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Returns the losses in fp64."""
    logits = logits_of(hidden[:, :-1], head)
    return cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )


def gradient_of(losses: Tensor, hidden: Tensor, upstream: Tensor) -> Tensor:
    (found,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    return found


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),  # sums of 24 and of 131 terms, each rounded to 6e-8
        # Logits come out of the head in bf16, so 2**-9 of up to 10. The unchunked loss of a bf16 model is as far away.
        (torch.bfloat16, 1e-2),
    ],
)
def test_loss_and_gradient(
    transform: LogitsTransform,
    chunk: int | None,
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks(monkeypatch, chunk)
    hidden, weight, labels = material(dtype)
    head = Head(weight, transform)
    upstream = torch.rand(BATCH, WINDOW - 1, generator=torch.Generator().manual_seed(1))
    found, expected = token_losses(hidden, head, labels), straightforward(hidden, head, labels)
    assert found.dtype == torch.float32
    assert worst(found, expected) < tolerance
    gradient = gradient_of(found, hidden, upstream)
    assert gradient.dtype == dtype
    assert worst(gradient, gradient_of(expected, hidden, upstream)) < tolerance


def test_a_batch_without_a_supervised_token_and_broken_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backward pass must still run, because the other ranks wait in its gathers."""
    hidden, weight, labels = material()
    losses = token_losses(hidden, Head(weight, NONE), torch.full_like(labels, IGNORE_INDEX))
    assert torch.equal(losses, torch.zeros(BATCH, WINDOW - 1))
    assert torch.equal(
        gradient_of(losses, hidden, torch.ones(BATCH, WINDOW - 1)), torch.zeros_like(hidden)
    )
    hidden, weight, labels = material(supervised=1)
    losses = token_losses(hidden * 1e4, Head(weight, NONE), labels)
    assert torch.isfinite(losses).all()
    assert losses.max() > 1e4
    with torch.no_grad():
        hidden[1, 3, 5] = torch.nan
    in_chunks(monkeypatch, 5)
    assert token_losses(hidden, Head(weight, NONE), labels).isnan().nonzero().tolist() == [[1, 3]]


class _Held(TorchDispatchMode):
    """Sums the bytes of all tensors that operations gave and that are still there, and keeps the largest sum."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.data_ptr() for tensor in given}  # views of these are no new memory
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in (result if isinstance(result, tuple) else [result])]
        alive = [
            tensor.untyped_storage() for ref in self.made if isinstance(tensor := ref(), Tensor)
        ]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
        self.most = max(self.most, sum(size for at, size in sizes.items() if at not in self.given))
        return result


def held(
    transform: LogitsTransform, dtype: torch.dtype, *, teaches: bool, temperature: float
) -> float:
    """Returns the most bytes at once, per logit of a chunk."""
    tokens, chunk, hidden_size, vocabulary = 64, 16, 2, 4096
    hidden = torch.randn(1, tokens + 1, hidden_size, dtype=dtype).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens + 1))
    weight = torch.randn(vocabulary, hidden_size, dtype=dtype)
    head = Head(weight, transform)
    distilled = Distillation(hidden.detach()[0, 1:], 0.5, temperature) if teaches else None
    with pytest.MonkeyPatch.context() as patch, _Held(weight) as most:
        in_chunks(patch, chunk)
        token_losses(hidden, head, labels, distilled).sum().backward()
    return most.most / (chunk * vocabulary)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "teaches", "temperature", "planned"),
    [
        (torch.float32, False, 1, 4),
        (torch.bfloat16, False, 1, 6),
        (torch.float32, True, 1, 12),
        (torch.bfloat16, True, 1, 12),
        (torch.float32, True, 2, 16),
        (torch.bfloat16, True, 2, 16),
    ],
)
def test_no_more_is_held_than_planned(
    transform: LogitsTransform,
    dtype: torch.dtype,
    *,
    teaches: bool,
    temperature: float,
    planned: int,
) -> None:
    """plan/ counts these bytes for each logit of a chunk. Other tensors, such as hidden states, add less than 0.2."""
    assert 4 < held(transform, dtype, teaches=teaches, temperature=temperature) < planned + 0.2


@pytest.mark.parametrize(
    ("at_once", "expected"), [(20 * VOCAB + 3, 20), (10 * VOCAB, 10), (VOCAB - 1, 1)]
)
def test_logits_per_chunk(at_once: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    logits = Head.logits
    monkeypatch.setattr(
        Head, "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden)
    )
    monkeypatch.setattr("loraprune_ds.model.logits.LOGITS_AT_ONCE", at_once)
    hidden, weight, labels = material(supervised=1)
    token_losses(hidden, Head(weight, NONE), labels).sum().backward()
    assert max(rows) == expected
    assert sum(rows) == BATCH * (WINDOW - 1)


# The distilled loss and its gradient against autograd in fp64, by the definition

TOKENS, WIDTH, VOCABULARY = 23, 8, 37
# fp32 against fp64. Losses are about 4, gradients about 1, each from sums of 37 terms.
TOLERANCE = 2e-6
DISTILLED = [*TRANSFORMS[:-1], LogitsTransform(softcap=2.0)]


def made_up() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the student's and the teacher's hidden states, the head and labels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
    head = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    return student, teacher, head, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def dense(
    student: Tensor, teacher: Tensor, head: Head, labels: Tensor, w: float, t: float
) -> Tensor:
    """Returns (tokens,) fp64 by the definition."""
    hard = cross_entropy(logits_of(student, head), labels, reduction="none")
    ours, theirs = (
        torch.log_softmax(logits_of(hidden, head) / t, 1) for hidden in (student, teacher)
    )
    divergence = (theirs.exp() * (theirs - ours)).sum(1)
    return (1 - w) * hard + w * t**2 * divergence


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("w", [0.3, 1.0])
@pytest.mark.parametrize("temperature", [1, 0.5, 2])
@pytest.mark.parametrize("transform", DISTILLED, ids=str)
def test_autograd_gives_the_same(
    transform: LogitsTransform,
    temperature: float,
    w: float,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_chunks(monkeypatch, chunk)
    student, teacher, weight, labels = made_up()
    head, weights = Head(weight, transform), torch.linspace(0.1, 1, TOKENS)
    student.requires_grad_()
    given = Distillation(teacher, w, temperature)
    window = torch.cat([student, student[:1]])[None]  # position t predicts label t + 1
    losses = token_losses(window, head, torch.cat([labels[:1], labels])[None], given)[0]
    (losses * weights).sum().backward()
    reference = student.detach().double().requires_grad_()
    expected = dense(reference, teacher, head, labels, w, temperature)
    (expected * weights).sum().backward()
    # the divergence is multiplied by the square of the temperature
    tolerance = TOLERANCE * max(1, temperature**2)
    assert (losses - expected).abs().max() < tolerance
    assert student.grad is not None
    assert reference.grad is not None
    assert (student.grad - reference.grad).abs().max() < tolerance
