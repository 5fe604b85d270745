"""A checkpoint of QLoRA is exported with the bits of the live model, or a line says why it cannot be."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds import PruneConfig
from loraprune_ds.checkpoint.layout import MANIFEST, seal, write_manifest
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json, write_json
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import train_and_save
from tests.support.qlora import DOUBLE, EIGHT, NF4_BITS, SIZES, load, stored_and_loaded, with_lora
from tests.support.refusals import must_name
from tests.support.resuming import read_tensors

REFIT = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)
NONE = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1, compensate="none")


def train(base: Any, out: Path, prune: PruneConfig) -> None:
    """Trains, with LoRA of its own. Saves a checkpoint after a cut of some layers, and the live model."""
    train_and_save(with_lora(base).train(), prune, out)


def stored(bits: dict[str, Any], folder: Path, out: Path) -> Any:
    return stored_and_loaded(out / "stored", folder, bits)


def loaded(bits: dict[str, Any], folder: Path, out: Path) -> Any:
    return load(folder, bits)


@pytest.mark.parametrize(
    ("make", "prune", "file_dtype"),
    [
        (partial(loaded, NF4_BITS), REFIT, "float32"),
        (partial(loaded, DOUBLE), NONE, "bfloat16"),
        (partial(loaded, DOUBLE), REFIT, "bfloat16"),
        (partial(loaded, EIGHT), REFIT, "bfloat16"),
        (
            partial(loaded, DOUBLE | {"llm_int8_skip_modules": ["v_proj", "lm_head"]}),
            NONE,
            "bfloat16",
        ),
        (partial(stored, DOUBLE), REFIT, "bfloat16"),
        (partial(stored, NF4_BITS), NONE, "bfloat16"),
        (partial(stored, EIGHT), NONE, "bfloat16"),
    ],
)
def test_a_checkpoint_is_exported_like_the_live_model(
    tmp_path: Path, make: Any, prune: PruneConfig, file_dtype: str
) -> None:
    folder = make_tiny_llama(tmp_path / "dense", dtype=file_dtype, biases=True, **SIZES)
    train(make(folder, tmp_path), tmp_path, prune)
    out = tmp_path / "exported"
    export(find_contents(tmp_path / "checkpoint-4"), "hf", out)
    expected = read_tensors(tmp_path / "live")
    found = read_tensors(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name
    config = read_json(out / "config.json")
    assert "quantization_config" not in config


def test_a_base_that_is_on_no_disk_is_named(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "dense", dtype="bfloat16", **SIZES)
    base = load(folder, NF4_BITS)
    other = base.model.layers[1].mlp.up_proj.weight
    other.data = other.data ^ 0x10
    train(base, tmp_path, NONE)
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("checkpoint-4 save_model", export, contents, "hf", tmp_path / "out")


def test_a_step_that_says_nothing_of_its_bits_is_named(tmp_path: Path) -> None:
    """The first steps of quantised bases name a folder. Its weights are not those of the training."""
    folder = make_tiny_llama(tmp_path / "dense", dtype="bfloat16", **SIZES)
    train(load(folder, NF4_BITS), tmp_path, NONE)
    path = tmp_path / "checkpoint-4" / "pruning" / "state.json"
    state = read_json(path)
    assert state["origin"].pop("bits") == "nf4"
    write_json(path, state)
    manifest = read_json(path.parent / MANIFEST)["files"]
    write_manifest(path.parent, manifest | {path.name: seal(path)})
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("checkpoint-4 save_model", export, contents, "hf", tmp_path / "out")
