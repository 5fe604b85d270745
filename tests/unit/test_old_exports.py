"""Exports of older versions: they have a modelling file of one family, and config.json names its classes.

old_exports/ has these files as the last such version wrote them. All else in config.json was as it is now.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.pretrained import cut_to, open_pretrained
from tests.export_cases import CASES, VOCAB, Case, cut, dense_model, export, exported_config
from tests.unit.shapes_and_scores import keep_of

FILES = Path(__file__).parent / "old_exports"
PROMPT = torch.arange(24).view(2, 12) * 7 % VOCAB
pytestmark = pytest.mark.usefixtures("fresh_transformers")
OLD = [case for case in CASES if case.name in ("layers_gqa_biases", "biases_odd_heads", "layers_window")]


def old_export(case: Case, folder: Path) -> dict[str, Any]:
    """Writes an export and turns it into an old one."""
    (folder.parent / "source").mkdir()
    exported = export(dense_model(case), case, folder.parent / "source", folder)
    assert exported.modelling_file is not None
    (folder / exported.modelling_file).unlink()
    module, classes = f"modeling_pruned_{case.family}", f"Pruned{case.family.title()}"
    shutil.copy(FILES / f"{module}.py", folder)
    parts = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    config = exported.config | {
        "architectures": [f"{classes}ForCausalLM"],
        "auto_map": {auto: f"{module}.{classes}{part}" for auto, part in parts.items()},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("case", OLD, ids=str)
def test_loads_with_its_own_file(case: Case, tmp_path: Path) -> None:
    config = old_export(case, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    assert [type(model).__name__] == config["architectures"]
    with torch.no_grad():
        expected = cut(dense_model(case), case)(PROMPT).logits
        torch.testing.assert_close(model(PROMPT).logits, expected, rtol=0, atol=1e-5)  # another attention, some ulps


@pytest.mark.parametrize("case", OLD, ids=str)
def test_can_be_pruned_again(case: Case, tmp_path: Path) -> None:
    """Names our file and its classes from then on."""
    old_export(case, tmp_path / "model")
    pretrained = open_pretrained(tmp_path / "model")
    new, _, shape = exported_config(dense_model(case), case)
    assert pretrained.shape.layers == shape.layers
    again = export_config(pretrained.config, pretrained.shape, case.dtype)
    assert (again.config, again.modelling_file) == (new.config, "modeling_pruned.py")
    kept = keep_of((list(range(heads)), list(range(1, channels))) for heads, channels in case.keep)
    assert cut_to(pretrained, kept, case.dtype).shape.layers == tuple(
        LayerShape(heads=layer["heads"], channels=layer["channels"] - 1) for layer in shape.layers
    )
