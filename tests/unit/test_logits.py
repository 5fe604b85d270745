"""Losses and logits of every family equal the stock model's, with all transforms, and by a complete attention."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cohere2Config, Gemma2Config, PreTrainedConfig, PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.generate.models import ModelSource, load_model
from loraprune_ds.model.classes import (
    attn_implementation,
    causal_lm_class,
    check_flash_attention,
    describe_attention,
)
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.logits import Head, LogitsTransform, logits_transform, output_head
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support.families import is_seq2seq, tiny_config, tiny_model
from tests.support.refusals import must_name
from tests.support.tolerances import worst

# Both sides are fp32, from the same hidden states. A logit is a sum of 60 products, a softmax one of 97, and a gradient
# one of 97 again. Each is rounded to 6e-8, in another order. The largest error found is 1e-6 of the largest element.
TOLERANCE = 2e-6
# the others: test_seq2seq.py
DECODERS = [family for family in sorted(FAMILIES) if not is_seq2seq(family)]
GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(3, 97, (2, 17), generator=GENERATOR)
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=GENERATOR) < 0.3, IGNORE_INDEX)


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
    loss = (
        given.loss
        if not isinstance(given, Tensor)
        else given.sum() / int((inputs["labels"][:, 1:] >= 0).sum())
    )
    return loss.detach(), torch.autograd.grad(loss, read[0])[0]


@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradient_are_transformers_own(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses_and_gradient(tiny_model(family), input_ids=IDS, labels=LABELS)
    for chunk in (1000, 1, 7):
        monkeypatch.setattr("loraprune_ds.model.logits.chunk_size", lambda *_, n=chunk, **__: n)
        found = losses_and_gradient(
            with_token_losses(tiny_model(family)), input_ids=IDS, labels=LABELS
        )
        assert max(map(worst, found, expected)) < TOLERANCE, chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_transformers_own_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    head = Head(output_head(model).weight, logits_transform(model.config))
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    # a tied weight has one
    expected, names = logits(model), [name for name, _ in model.named_parameters()]
    assert torch.equal(head.logits(hidden), expected)
    model = with_token_losses(model)
    assert torch.equal(logits(model), expected)
    assert [name for name, _ in model.named_parameters()] == names


NONE = LogitsTransform()


@pytest.mark.parametrize(
    ("config", "transform"),
    [
        (tiny_config("gemma2", final_logit_softcapping=None), NONE),
        (tiny_config("gemma3_text", final_logit_softcapping=None), NONE),
        (tiny_config("granite", logits_scaling=1.0), NONE),
        (tiny_config("cohere2", logit_scale=1.0), NONE),
        (Gemma2Config(), LogitsTransform(softcap=30.0)),  # the default of its class
        (Cohere2Config(), LogitsTransform(scale=0.0625)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_config_names_the_transform(
    config: PreTrainedConfig, transform: LogitsTransform
) -> None:
    """With the values that change nothing, and with defaults of the class. The tests above have all families."""
    assert logits_transform(config) == transform


def test_a_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = nn.Linear(60, 97)
    must_name("LlamaForCausalLM lm_head", with_token_losses, model)


# The attention implementation computes all of the attention, with sdpa where that exists

FLASH = "flash_attention_2"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_becomes_eager_where_sdpa_is_not_enough(family: str) -> None:
    """test_family_proof.py compares sdpa and eager in the others."""
    row, capped = FAMILIES[family], family in ("gemma2", "gpt_oss", "vaultgemma")
    assert causal_lm_class(family)._supports_sdpa != capped
    assert attn_implementation("sdpa", row) == ("eager" if capped else "sdpa")
    assert (describe_attention("sdpa", row) is not None) == capped
    for asked in ("eager", FLASH):
        assert attn_implementation(asked, row) == asked
        assert describe_attention(asked, row) is None


@pytest.mark.parametrize(("dtype", "named"), [("bfloat16", "GPU"), ("float32", "model.dtype")])
def test_flash_attention_without_a_gpu_a_package_or_in_fp32_is_refused(
    dtype: Dtype, named: str, tmp_path: Path
) -> None:
    config = ModelConfig(attn_implementation=FLASH, dtype=dtype)
    must_name(f"model.attn_implementation {FLASH} {named}", check_flash_attention, config)
    check_flash_attention(ModelConfig(attn_implementation="sdpa", dtype=dtype))
    tiny_model("llama").save_pretrained(tmp_path)
    must_name(
        f"model.attn_implementation {FLASH}", build_for_losses, open_pretrained(tmp_path), FLASH
    )


def test_a_capped_model_is_built_and_loaded_with_its_cap(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert build_for_losses(pretrained, "sdpa").config._attn_implementation == "eager"
    loaded = load_model(
        ModelSource("gemma2", "checkpoint", pretrained, tmp_path), "float32", torch.device("cpu")
    )
    assert torch.equal(logits(loaded), logits(model))
    assert (
        logits(tiny_model("gemma2", attn_logit_softcapping=None)) - logits(model)
    ).abs().max() > 0.1
