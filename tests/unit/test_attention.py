"""The attention implementation of each family computes all of its attention, with sdpa where that exists."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loraprune_ds.config import Dtype, ModelConfig
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.models import FoundModel, load_model
from loraprune_ds.model.classes import attn_implementation, causal_lm_class, check_flash_attention, describe_attention
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.token_loss import build_for_losses
from tests.families import tiny_model

CAPPED = sorted(family for family in FAMILIES if FAMILIES[family].eager_only)
# fp32. Softmax and its products are summed in another order, which the two layers and the head carry on.
TOLERANCE = 1e-5
IDS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(5))


def logits(family: str, **settings: Any) -> Tensor:
    with torch.no_grad():
        return tiny_model(family, **settings)(input_ids=IDS, use_cache=False).logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_transformers_has_sdpa_for_all_families_but_the_capped_ones() -> None:
    supported = {family: causal_lm_class(family)._supports_sdpa for family in FAMILIES}
    assert supported == {family: family not in CAPPED for family in FAMILIES}
    assert CAPPED == ["gemma2", "gpt_oss"]


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - CAPPED))
def test_sdpa_and_eager_are_the_same(family: str) -> None:
    eager, sdpa = (logits(family, attn_implementation=used) for used in ("eager", "sdpa"))
    assert difference(sdpa, eager) < TOLERANCE


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_default_becomes_eager_where_scores_are_capped(family: str) -> None:
    row, capped = FAMILIES[family], family in CAPPED
    assert attn_implementation("sdpa", row) == ("eager" if capped else "sdpa")
    assert (describe_attention("sdpa", row) is not None) == capped
    for asked in ("eager", "flash_attention_2"):
        assert attn_implementation(asked, row) == asked
        assert describe_attention(asked, row) is None


def test_the_run_says_so_in_one_line() -> None:
    assert describe_attention("sdpa", FAMILIES["gemma2"]) == (
        "model.attn_implementation: eager instead of sdpa, which lacks a cap on scores (attn_logit_softcapping)"
    )


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_without_a_gpu_or_in_fp32_is_one_line(asked: str) -> None:
    cases: list[tuple[Dtype, str]] = [
        ("bfloat16", "needs a GPU, and this rank sees none"),
        ("float32", "needs model.dtype"),
    ]
    for dtype, reason in cases:
        config = ModelConfig(attn_implementation=asked, dtype=dtype)
        with pytest.raises(UserError, match=f"^model.attn_implementation {asked} {reason}"):
            check_flash_attention(config)
    check_flash_attention(ModelConfig(attn_implementation="sdpa", dtype="float32"))


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_without_its_package_is_one_line(tmp_path: Path, asked: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.attn_implementation {asked}.*: ImportError: ") as caught:
        build_for_losses(open_pretrained(tmp_path), asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_gets_the_same_attention_to_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, asked: str
) -> None:
    """A stand-in with the kernels' arguments. It computes what they describe: causal, no mask, a cap, a window."""
    seen: list[dict[str, Any]] = []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any) -> Any:
        seen.append(arguments)
        assert attention_mask is None  # right-padded rows are causal: no varlen path
        assert getattr(module, "is_causal", True)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * arguments["scaling"]
        if cap := arguments.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
        window = arguments.get("sliding_window")
        hidden = (distance < 0) | (distance >= (window or len(distance)))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *args, **kwargs: None)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, asked, kernel)
    tiny_model(family).save_pretrained(tmp_path)
    flash, eager = (tiny_model(family, attn_implementation=name) for name in (asked, "eager"))
    assert build_for_losses(open_pretrained(tmp_path), asked).config._attn_implementation == asked
    with torch.no_grad():
        outputs = [model(input_ids=IDS, use_cache=False).logits for model in (flash, eager)]
    assert len(seen) == len(flash.model.layers)
    assert difference(*outputs) < TOLERANCE


def test_a_model_without_the_cap_is_another_one() -> None:
    assert difference(logits("gemma2", attn_logit_softcapping=None), logits("gemma2")) > 0.1


def test_a_capped_model_is_built_and_loaded_with_its_cap(tmp_path: Path) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert build_for_losses(pretrained, "sdpa").config._attn_implementation == "eager"
    found = FoundModel("gemma2", "checkpoint", pretrained, tmp_path)
    with torch.no_grad():
        loaded = load_model(found, "float32", torch.device("cpu"))(input_ids=IDS, use_cache=False).logits
    assert torch.equal(loaded, logits("gemma2"))
