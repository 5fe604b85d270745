"""Nemotron-H as Nemotron-3 Nano is published: with experts or with MLPs, and other names in its files."""

from pathlib import Path

import pytest

from loraprune_ds.config import PruneConfig
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.weight_files import read_headers
from loraprune_ds.pruning.target import make_limits
from tests.families import tiny_config, tiny_model
from tests.family_cuts import FEW, cut_and_export, difference, load, logits, reopened, with_lora
from tests.published import NEMOTRON_3_NANO_4B
from tests.refusals import must_name

TOLERANCE = 1e-5  # as in test_family_proof.py
pytestmark = pytest.mark.usefixtures("fresh_transformers")


def publish(folder: Path, pattern: str) -> None:
    """Writes a tiny model with the fields of the published config.json, of which transformers 5 writes others."""
    tiny_model("nemotron_h", hybrid_override_pattern=pattern, moe_latent_size=None).save_pretrained(folder)
    config = read_json(folder / "config.json")
    types = len(config.pop("layers_block_type"))
    write_json(folder / "config.json", config | {"hybrid_override_pattern": pattern, "num_hidden_layers": types})


@pytest.mark.parametrize(("pattern", "fine"), [("MEM*EM", "experts"), ("M-M*-M", "channels")])
def test_a_published_layout_is_read_cut_and_written(pattern: str, fine: str, tmp_path: Path) -> None:
    """Its names begin with `backbone.`. Layers of Mamba-2 keep their tensors, although they have no groups."""
    publish(tmp_path / "published", pattern)
    source = open_pretrained(tmp_path / "published")
    assert source.shape.kinds == ("heads", fine)
    assert difference(logits(reopened(source)), logits(load(source.folder))) < TOLERANCE
    network = with_lora(reopened(source), source.config, "nemotron_h")
    made = cut_and_export(network, tmp_path / "cut", FEW, source=source)
    model = load(made.folder)
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert difference(logits(model), made.logits) < TOLERANCE
    before, after = (read_headers(folder) for folder in (source.folder, made.folder))
    assert {name.split(".")[0] for name in after} == {"backbone", "lm_head"}
    mamba = [name for name in before for i, mixer in enumerate(pattern) if mixer == "M" and f".layers.{i}." in name]
    assert {name: after[name][0] for name in mamba} == {name: before[name][0] for name in mamba}
    assert open_pretrained(made.folder).shape == made.shape


def test_a_layer_without_channels_is_not_too_narrow() -> None:
    shape = shape_from_config(tiny_config("nemotron_h", hybrid_override_pattern="M-*").to_dict(), "tiny")
    assert make_limits(PruneConfig(ratio=0.2, channel_multiple=16, protected_last=0), shape).floor[1]["channels"] == 16
    must_name("channel_multiple 24 layer 1 23", make_limits, PruneConfig(ratio=0.2, channel_multiple=24), shape)


def test_the_published_model_without_experts_has_the_parameters_that_are_published() -> None:
    source, billions = NEMOTRON_3_NANO_4B
    assert shape_from_config(source, "4B").total_numel() / 1e9 == pytest.approx(billions, rel=0.003)
