"""Losses and logits of every family equal the stock model's, with all transforms of the head's product."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cohere2Config, Gemma2Config, PreTrainedConfig, PreTrainedModel

from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.logits import Head, LogitsTransform, logits_transform, output_head
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from tests.families import tiny_config, tiny_model
from tests.refusals import refuses

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


def ids_and_labels() -> tuple[Tensor, Tensor]:
    """Returns (2, 17) each. Some labels are not supervised."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (2, 17), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, IGNORE_INDEX)


def losses_and_gradient(model: PreTrainedModel, **inputs: Any) -> tuple[Any, Tensor]:
    """Returns the mean loss, and its gradient by the input of the head."""
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


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradient_are_transformers_own(family: str) -> None:
    ids, labels = ids_and_labels()
    expected = losses_and_gradient(tiny_model(family), input_ids=ids, labels=labels)
    for chunk in (None, 1, 7):
        found = losses_and_gradient(with_token_losses(tiny_model(family), chunk), input_ids=ids, labels=labels)
        assert max(map(worst, found, expected)) < TOLERANCE, chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_transformers_own_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    ids, _ = ids_and_labels()
    model = tiny_model(family, dtype=dtype)
    head = Head(output_head(model).weight, logits_transform(model.config))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        assert torch.equal(head.logits(hidden), model(input_ids=ids, use_cache=False).logits)


NONE = LogitsTransform()


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        *((tiny_config(family), TRANSFORMED.get(family, NONE)) for family in sorted(FAMILIES)),
        (tiny_config("gemma2", final_logit_softcapping=None), NONE),
        (tiny_config("gemma3_text", final_logit_softcapping=None), NONE),
        (tiny_config("granite", logits_scaling=1.0), NONE),
        (tiny_config("cohere2", logit_scale=1.0), NONE),
        (Gemma2Config(), LogitsTransform(softcap=30.0)),  # the default of its class
        (Cohere2Config(), LogitsTransform(scale=0.0625)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_config_names_the_transform(config: PreTrainedConfig, transform: LogitsTransform) -> None:
    assert logits_transform(config) == transform


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(60, 97)
    refuses("LlamaForCausalLM: lm_head has a bias", with_token_losses, model, None)
