"""A mixture of experts that a user's loop trains: what it saves, stock transformers loads."""

from dataclasses import replace
from itertools import product as cases
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraprune_ds import lora_config, prepare_model
from loraprune_ds.config_types import Ranking
from loraprune_ds.pretrained.adapters import give_base
from tests.support.families import tiny_model
from tests.support.local_training import PRUNE, train_and_save
from tests.support.paper import OPEN
from tests.support.stranger import LOOK, ask_stranger


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_live_mixture_is_saved_with_fewer_experts(
    family: str, ranking: Ranking, tmp_path: Path
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path / "dense")
    base: Any = prepare_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    model: Any = get_peft_model(base, lora_config(base, r=2)).train()
    train_and_save(model, replace(PRUNE, ranking=ranking, **OPEN), tmp_path)
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "live", trust_remote_code=True)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = (cast(Any, each).eval()(tokens).logits for each in (model, saved))
    # merged LoRA rounds once more
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    dense = sum(parameter.numel() for parameter in tiny_model(family).parameters())
    assert sum(parameter.numel() for parameter in saved.parameters()) < 0.9 * dense


STRANGER = """
from peft import PeftModel

for folder in map(Path, sys.argv[1:]):
    base = load(folder / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = model(torch.tensor([[5, 6, 7, 8]])).logits
    tell({"logits": found}, str(folder / "found"))
"""


def test_stock_peft_loads_a_live_mixture_s_adapter_on_its_base(tmp_path: Path) -> None:
    folders: dict[Path, Any] = {}
    for family, ranking in cases(("deepseek_v3", "gpt_oss"), ("global", "uniform")):
        folder = tmp_path / f"{family}-{ranking}"
        tiny_model(family, seed=1).save_pretrained(folder / "dense")
        base: Any = prepare_model(AutoModelForCausalLM.from_pretrained(folder / "dense"))
        model: Any = get_peft_model(base, lora_config(base, r=2)).train()
        pruning = train_and_save(model, replace(PRUNE, ranking=ranking, **OPEN), folder)
        model.save_pretrained(folder / "adapter")
        pruning.save_base(folder / "base", folder / "adapter")
        give_base(folder / "adapter", "again", pruning.model.shape)
        folders[folder] = model
    ask_stranger(LOOK + STRANGER, *folders, folder=tmp_path)
    for folder, model in folders.items():
        with torch.no_grad():
            expected = model.eval()(torch.tensor([[5, 6, 7, 8]])).logits
        found = load_file(folder / "found.safetensors")["logits"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
