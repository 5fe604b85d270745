"""The attention implementation of each family computes all of its attention, with sdpa where that exists."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import Dtype, ModelConfig
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.models import ModelSource, load_model
from loraprune_ds.model.classes import attn_implementation, causal_lm_class, check_flash_attention, describe_attention
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.token_loss import build_for_losses
from tests.families import tiny_model
from tests.refusals import refuses

FLASH = "flash_attention_2"
IDS = torch.randint(3, 97, (2, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_becomes_eager_where_sdpa_is_not_enough(family: str) -> None:
    """test_family_proof.py compares sdpa and eager in the others."""
    row, capped = FAMILIES[family], family in ("gemma2", "gpt_oss")
    assert causal_lm_class(family)._supports_sdpa != capped
    assert attn_implementation("sdpa", row) == ("eager" if capped else "sdpa")
    line = f"model.attn_implementation: eager instead of sdpa, which lacks {row.eager_only}"
    assert describe_attention("sdpa", row) == (line if capped else None)
    for asked in ("eager", FLASH):
        assert attn_implementation(asked, row) == asked
        assert describe_attention(asked, row) is None


@pytest.mark.parametrize(("dtype", "reason"), [("bfloat16", "needs a GPU"), ("float32", "needs model.dtype")])
def test_flash_attention_without_a_gpu_or_in_fp32_is_refused(dtype: Dtype, reason: str) -> None:
    config = ModelConfig(attn_implementation=FLASH, dtype=dtype)
    refuses(f"^model.attn_implementation {FLASH} {reason}", check_flash_attention, config)
    check_flash_attention(ModelConfig(attn_implementation="sdpa", dtype=dtype))


def test_flash_attention_without_its_package_is_one_line(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.attn_implementation {FLASH}.*: ImportError: .*$"):
        build_for_losses(open_pretrained(tmp_path), FLASH)


def test_a_capped_model_is_built_and_loaded_with_its_cap(tmp_path: Path) -> None:
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert build_for_losses(pretrained, "sdpa").config._attn_implementation == "eager"
    loaded = load_model(ModelSource("gemma2", "checkpoint", pretrained, tmp_path), "float32", torch.device("cpu"))
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(tiny_model("gemma2", attn_logit_softcapping=None)) - logits(model)).abs().max() > 0.1
