"""Losses of every family equal those of transformers' own model, whatever that does to the product of its head."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.errors import UserError
from loraprune_ds.model import token_loss
from loraprune_ds.model.distillation import Distillation, HiddenTeacher, Recording, TopTeacher
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.logits import Head, LogitsTransform, logits_transform, output_head
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from tests.families import tiny_config, tiny_model

# Where the table names a field that tests/families.py fills. Without the transform these models are other ones.
TRANSFORMED = {
    "gemma2": LogitsTransform(softcap=8.0),
    "gemma3_text": LogitsTransform(softcap=10.0),
    "granite": LogitsTransform(divisor=3.0),
    "granitemoe": LogitsTransform(divisor=3.0),
    "cohere2": LogitsTransform(scale=0.3),
}
# Both sides are fp32, from the same hidden states. A logit is a sum of 60 products, a softmax one of 97, and a gradient
# one of 97 again. Each is rounded to 6e-8, in another order. The largest error found is 1e-6 of the largest element.
TOLERANCE = 2e-6
CHUNKS = [None, 1, 7]


def ids_and_labels() -> tuple[Tensor, Tensor]:
    """Returns (2, 17) each. Some labels are not supervised."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (2, 17), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, IGNORE_INDEX)


def losses_and_gradient(model: PreTrainedModel, **inputs: Any) -> tuple[Any, Tensor]:
    """Returns what the model gives, as a mean loss, and its gradient by what the head reads."""
    read: list[Tensor] = []

    def make_leaf(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        read.append(given[0].detach().requires_grad_())
        return read[0], *given[1:]

    model.requires_grad_(False)
    hook = model.get_submodule("lm_head").register_forward_pre_hook(make_leaf)
    given = model(**inputs)
    hook.remove()
    loss = given.loss if not isinstance(given, Tensor) else given.sum() / int((inputs["labels"][:, 1:] >= 0).sum())
    return loss.detach(), torch.autograd.grad(loss, read[0])[0]


def worst(found: Tensor, expected: Tensor) -> float:
    """Returns the largest error relative to the largest element. Other elements can be zero but for rounding."""
    return float((found - expected).abs().max() / expected.abs().max())


def worst_error(family: str, chunk: int | None) -> float:
    """Compares loss and gradient with those of the stock model."""
    ids, labels = ids_and_labels()
    expected, expected_gradient = losses_and_gradient(tiny_model(family), input_ids=ids, labels=labels)
    model = with_token_losses(tiny_model(family), chunk)
    loss, gradient = losses_and_gradient(model, input_ids=ids, labels=labels)
    return max(worst(loss, expected), worst(gradient, expected_gradient))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradient_are_transformers_own(family: str) -> None:
    assert max(worst_error(family, chunk) for chunk in CHUNKS) < TOLERANCE


@pytest.mark.parametrize("family", sorted(TRANSFORMED))
def test_without_the_transform_they_are_not(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(token_loss, "logits_transform", lambda config: LogitsTransform())
    assert worst_error(family, None) > 0.1


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_without_the_slope_of_the_cap_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(LogitsTransform, "uncap_", lambda self, gradient, logits: None)
    assert worst_error(family, None) > 0.1


@pytest.mark.parametrize("family", ["granite", "cohere2"])
def test_without_the_factor_the_gradient_is_wrong(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr(LogitsTransform, "unscale", lambda self, gradient: gradient)
    assert worst_error(family, None) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_transformers_own_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    """They are rounded at the same places, so that perplexities agree in bf16, too."""
    ids, _ = ids_and_labels()
    model = tiny_model(family, dtype=dtype)
    head = Head(output_head(model).weight, logits_transform(model.config))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(head.logits(hidden), model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", sorted(TRANSFORMED))
def test_the_config_names_the_transform(family: str) -> None:
    assert logits_transform(tiny_config(family)) == TRANSFORMED[family]


def test_all_other_families_have_none() -> None:
    """Neither have those of the table whose config says nothing or 1, so that they cost nothing."""
    none = [logits_transform(tiny_config(family)) for family in FAMILIES.keys() - TRANSFORMED.keys()]
    none += [
        logits_transform(tiny_config(family, final_logit_softcapping=None)) for family in ("gemma2", "gemma3_text")
    ]
    none += [logits_transform(tiny_config("granite", logits_scaling=1.0))]
    none += [logits_transform(tiny_config("cohere2", logit_scale=1.0))]
    assert set(none) == {LogitsTransform()}


def test_a_config_that_leaves_the_field_out_has_the_default_of_its_class() -> None:
    assert logits_transform(type(tiny_config("gemma2"))()) == LogitsTransform(softcap=30.0)
    assert logits_transform(type(tiny_config("cohere2"))()) == LogitsTransform(scale=0.0625)


def test_both_slopes_together_are_autograds() -> None:
    """In fp64, where the only error is of 1e-16 per operation."""
    transform = LogitsTransform(scale=1.7, divisor=3.0, softcap=2.0)
    generator = torch.Generator().manual_seed(0)
    product, upstream = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    product.requires_grad_()
    logits = 2.0 * torch.tanh(product / 3.0 * 1.7 / 2.0)
    (expected,) = torch.autograd.grad((logits * upstream).sum(), product)
    found = transform.apply_(product.detach().clone())
    torch.testing.assert_close(found, logits.detach(), rtol=1e-14, atol=1e-14)
    gradient = upstream.clone()
    transform.uncap_(gradient, found)
    torch.testing.assert_close(transform.unscale(gradient), expected, rtol=1e-13, atol=1e-14)


def teacher_model(family: str) -> PreTrainedModel:
    """Builds another model of the family with the same head, which neither training nor a cut changes."""
    model = tiny_model(family, seed=1)
    output_head(model).weight.data = output_head(tiny_model(family)).weight.data
    return model


def teacher_of(family: str, top_k: int | None) -> HiddenTeacher | TopTeacher:
    ids, labels = ids_and_labels()
    fields = with_token_losses(teacher_model(family), 5)(input_ids=ids, labels=labels, distillation=Recording(top_k))
    return HiddenTeacher(**fields) if top_k is None else TopTeacher(**fields)


def expected_distilled(student: Tensor, teacher: Tensor, labels: Tensor, w: float) -> Tensor:
    """Returns the mean of (1 - w) · cross-entropy + w · KL over supervised tokens, by the definition."""
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    losses = w * (theirs.exp() * (theirs - ours)).sum(-1) - (1 - w) * ours.gather(1, labels[:, None])[:, 0]
    return losses.mean()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("top_k", [None, 97])
@pytest.mark.parametrize("family", ["llama", *sorted(TRANSFORMED)])
def test_distilled_losses_compare_transformers_own_logits(family: str, top_k: int | None, chunk: int | None) -> None:
    """With all 97 logits kept nothing is in the rest, so both kinds of teacher have one and the same definition."""
    ids, labels = ids_and_labels()
    supervised = labels[:, 1:] != IGNORE_INDEX
    student = tiny_model(family).requires_grad_(False)
    with torch.no_grad():
        teacher = teacher_model(family)(input_ids=ids, use_cache=False).logits[:, :-1][supervised]
    read: list[Tensor] = []

    def make_leaf(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        read.append(given[0].detach().requires_grad_())
        return (read[0],)

    student.get_submodule("lm_head").register_forward_pre_hook(make_leaf)
    logits = student(input_ids=ids, use_cache=False).logits[:, :-1][supervised]
    expected = expected_distilled(logits, teacher, labels[:, 1:][supervised], 0.4)
    (expected_gradient,) = torch.autograd.grad(expected, read[0])
    loss, gradient = losses_and_gradient(
        with_token_losses(tiny_model(family), chunk),
        input_ids=ids,
        labels=labels,
        distillation=Distillation(teacher_of(family, top_k), 0.4),
    )
    assert worst(loss, expected.detach()) < TOLERANCE
    assert worst(gradient, expected_gradient) < TOLERANCE


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(60, 97)
    with pytest.raises(UserError, match="LlamaForCausalLM: lm_head has a bias"):
        with_token_losses(model, None)
