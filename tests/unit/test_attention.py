"""The attention implementation of each family computes all of its attention, with sdpa where that exists."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.evaluate.models import FoundModel, load_model
from loraprune_ds.model.attention import attn_implementation, describe_attention
from loraprune_ds.model.classes import causal_lm_class
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.token_loss import build_for_losses
from tests.families import tiny_model

CAPPED = sorted(family for family in FAMILIES if FAMILIES[family].attention_softcap)
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
    assert CAPPED == ["gemma2"]


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
        "model.attn_implementation: eager instead of sdpa, which cannot cap attention scores (attn_logit_softcapping)"
    )


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
