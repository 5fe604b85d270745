"""Checks the tables of families in loraprune_ds/model/README.md, and that a family without a row of GGUF has none."""

from pathlib import Path

import pytest

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf import write_gguf
from loraprune_ds.export.gguf_architecture import ARCHITECTURES
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.pretrained import ModelWeights, PretrainedModel
from loraprune_ds.model.read_shape import read_model
from tests.families import tiny_config
from tests.family_table import PAGE, with_tables


def test_the_readme_has_the_tables() -> None:
    """`python -m tests.family_table` writes them."""
    assert with_tables(PAGE.read_text()) == PAGE.read_text()


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - ARCHITECTURES.keys()))
def test_no_gguf_of_other_families(family: str, tmp_path: Path) -> None:
    config = tiny_config(family).to_dict()
    shape, modules = read_model(config, family)
    pretrained = PretrainedModel(tmp_path, config, modules, ModelWeights(shape, {}, {}, {}))
    with pytest.raises(UserError, match=f"not for {family}"):
        write_gguf(pretrained, tmp_path / "model.gguf", "f16", family)
    assert not list(tmp_path.iterdir())
