"""Nemotron-H as Nemotron-3 Nano is published: with experts or with MLPs, and other names in its files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loraprune_ds.checkpoint.layout import REFITS, layer_file
from loraprune_ds.checkpoint.load import open_tensors
from loraprune_ds.config import PruneConfig
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.classes import causal_lm_class
from loraprune_ds.model.shape import cached_numel, state_numel
from loraprune_ds.pretrained.fewer_layers import config_of_layers, drop_layers
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.weight_files import read_headers, write_index, write_weight_file
from loraprune_ds.pruning.limits import make_limits
from tests.support.families import tiny_config, tiny_model
from tests.support.family_cuts import (
    FEW,
    cut_and_export,
    difference,
    load,
    logits,
    reopened,
    with_lora,
)
from tests.support.published import NEMOTRON_3_NANO_4B
from tests.support.refusals import must_name

TOLERANCE = 1e-5  # as in test_family_proof.py
pytestmark = pytest.mark.usefixtures("fresh_transformers")


def publish(folder: Path, pattern: str) -> None:
    """Writes a tiny model with the fields of the published config.json, of which transformers 5 writes others."""
    tiny_model("nemotron_h", hybrid_override_pattern=pattern, moe_latent_size=None).save_pretrained(
        folder
    )
    config = read_json(folder / "config.json")
    config |= {
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(config.pop("layers_block_type")),
    }
    write_json(folder / "config.json", config | {"num_nextn_predict_layers": 1})
    write_weight_file(folder / "mtp.safetensors", {"mtp.layers.0.norm.weight": torch.ones(60)})
    write_index(folder, ["model.safetensors", "mtp.safetensors"])


@pytest.mark.parametrize(("pattern", "fine"), [("MEM*EM", "experts"), ("M-M*-M", "channels")])
def test_a_published_layout_is_read_cut_and_written(
    pattern: str, fine: str, tmp_path: Path
) -> None:
    """Its names begin with `backbone.`. Layers of Mamba-2 keep their tensors, although they have no groups.

    Layers that predict further tokens are left out.
    """
    publish(tmp_path / "published", pattern)
    source = open_pretrained(tmp_path / "published")
    assert source.shape.kinds == ("heads", fine)
    assert difference(logits(reopened(source)), logits(load(source.folder))) < TOLERANCE
    network = with_lora(reopened(source), source.config, "nemotron_h")
    made = cut_and_export(network, tmp_path / "cut", FEW, source=source)
    model = load(made.folder)
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert difference(logits(model), made.logits) < TOLERANCE
    assert made.exported.config["num_nextn_predict_layers"] == 0
    before, after = (read_headers(folder) for folder in (source.folder, made.folder))
    assert {name.split(".")[0] for name in after} == {"backbone", "lm_head"}
    layers = tuple(f"backbone.layers.{i}." for i, mixer in enumerate(pattern) if mixer == "M")
    mamba = [name for name in before if name.startswith(layers)]
    assert len(mamba) == len(layers) * 9
    assert {name: after[name][0] for name in mamba} == {name: before[name][0] for name in mamba}
    assert open_pretrained(made.folder).shape == made.shape


def test_dropped_layers_leave_the_published_pattern(tmp_path: Path) -> None:
    """Readers other than transformers 5 take the layers from it."""
    publish(tmp_path, "MEM*EM")
    published = open_pretrained(tmp_path)
    config = config_of_layers(published.config, published.shape, [0, 2, 4, 5])
    assert (config["hybrid_override_pattern"], config["num_hidden_layers"]) == ("MMEM", 4)
    model = tiny_model("nemotron_h", hybrid_override_pattern="MEM*EM")
    drop_layers(model, (1, 3))
    assert (model.config.hybrid_override_pattern, model.config.num_hidden_layers) == ("MMEM", 4)


def test_refitted_linears_of_a_step_replace_those_of_the_source(tmp_path: Path) -> None:
    """A step names them as the class does, without `backbone.`."""
    publish(tmp_path / "published", "M-M*-M")
    weights = open_pretrained(tmp_path / "published").weights
    name = f"{weights.shape.prefix(3)}mixer.o_proj.weight"
    refitted = torch.ones(weights.shape.parameters()[name])
    save_file({name: refitted}, tmp_path / layer_file("refit", 3))
    both = weights.overlaid(open_tensors(weights.shape, tmp_path, REFITS))
    assert torch.equal(both.read_full(name, torch.float32), refitted)
    others = (other for other in weights.shape.parameters() if other != name)
    assert all(
        torch.equal(both.read_full(x, torch.float32), weights.read_full(x, torch.float32))
        for x in others
    )


def test_routers_stay_fp32_as_in_transformers() -> None:
    names = causal_lm_class("nemotron_h")._keep_in_fp32_modules_strict or ()
    layers = shape_from_config(tiny_config("nemotron_h").to_dict(), "tiny").layers
    in_fp32 = {tensor.name for layer in layers for tensor in layer.tensors if tensor.keep_fp32}
    assert in_fp32 == {
        x.name for layer in layers for x in layer.tensors if any(name in x.name for name in names)
    }


def test_a_layer_without_channels_is_not_too_narrow() -> None:
    shape = shape_from_config(
        tiny_config("nemotron_h", hybrid_override_pattern="M-*").to_dict(), "tiny"
    )
    assert (
        make_limits(PruneConfig(channel_multiple=16, protected_last=0), shape).floor[1]["channels"]
        == 16
    )
    must_name(
        "channel_multiple 24 layer 1 23", make_limits, PruneConfig(channel_multiple=24), shape
    )


def test_the_published_model_without_experts_has_the_parameters_that_are_published() -> None:
    """It has 21 layers of Mamba-2 with 96 heads, and 4 of attention with 8."""
    source, billions = NEMOTRON_3_NANO_4B
    shape = shape_from_config(source, "4B")
    assert shape.total_numel() / 1e9 == pytest.approx(billions, rel=0.003)
    assert (state_numel(shape), cached_numel(shape)) == (21 * 96 * 80 * 128, 4 * 2 * 8 * 128)
