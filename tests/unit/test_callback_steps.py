"""A callback's checkpoint is a step: exports and evaluations read it like a step of a run, also of a quantised base."""

from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM

from loraprune_ds import PruneConfig
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json
from loraprune_ds.generate.models import find_model
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import train_and_save
from tests.support.qlora import DOUBLE, EIGHT, NF4_BITS, SIZES, load, stored_and_loaded, with_lora
from tests.support.refusals import Spoil, edit, edit_tensors, must_name, remove
from tests.support.resuming import assert_equal_tensors, read_tensors

REFIT = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)
NONE = replace(REFIT, compensate="none")
PATTERNS: dict[str, Any] = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 32}}
SOME = DOUBLE | {"llm_int8_skip_modules": ["v_proj", "lm_head"]}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "dense", dtype="bfloat16", biases=True, **SIZES)


def train(base: Any, out: Path, prune: PruneConfig = REFIT, make: Any = AdamW, **lora: Any) -> None:
    """Trains, with LoRA of its own. Saves a checkpoint after a cut of some layers, and the live model."""
    train_and_save(with_lora(base, **lora).train(), prune, out, make)


def plain(folder: Path) -> Any:
    return load(folder, None)


def stored(bits: dict[str, Any], folder: Path) -> Any:
    return stored_and_loaded(folder.parent / "stored", folder, bits)


@pytest.mark.parametrize(
    ("base", "prune", "make", "lora"),
    [
        (plain, REFIT, AdamW, {}),
        (plain, REFIT, SGD, {}),  # no state of Adam, but LoRA
        (plain, REFIT, AdamW, {"use_rslora": True, **PATTERNS}),
        (plain, REFIT, AdamW, {"modules_to_save": ["lm_head", "model.norm"]}),
        (partial(load, bits=DOUBLE), NONE, AdamW, {}),
        (partial(load, bits=DOUBLE), REFIT, AdamW, {}),
        (partial(load, bits=EIGHT), REFIT, AdamW, {}),
        (partial(load, bits=SOME), NONE, AdamW, {}),
        (partial(stored, DOUBLE), REFIT, AdamW, {}),
        (partial(stored, NF4_BITS), NONE, AdamW, {}),
        (partial(stored, EIGHT), NONE, AdamW, {}),
    ],
)
def test_a_checkpoint_is_exported_like_the_live_model(
    dense: Path, tmp_path: Path, base: Any, prune: PruneConfig, make: Any, lora: dict[str, Any]
) -> None:
    train(base(dense), tmp_path, prune, make, **lora)
    out, live = tmp_path / "exported", tmp_path / "live"
    assert export(find_contents(tmp_path / "checkpoint-4"), "hf", out) == [
        "taken from checkpoint-4"
    ]
    found = read_tensors(out)
    assert_equal_tensors(found, read_tensors(live))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    config = read_json(out / "config.json")
    del config["use_cache"]  # trainers switch it off
    assert config == read_json(live / "config.json")
    assert "quantization_config" not in config
    assert (out / "README.md").read_text() == (live / "README.md").read_text()


def test_files_in_fp32_are_exported_in_the_dtype_of_the_training(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "dense", biases=True, **SIZES)
    train(load(folder, NF4_BITS), tmp_path)
    export(find_contents(tmp_path / "checkpoint-4"), "hf", tmp_path / "exported")
    found = read_tensors(tmp_path / "exported")
    assert_equal_tensors(found, read_tensors(tmp_path / "live"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_its_adapter_keeps_ranks_and_scalings(dense: Path, tmp_path: Path) -> None:
    train(plain(dense), tmp_path, **PATTERNS)
    out = tmp_path / "adapter"
    export(find_contents(tmp_path / "checkpoint-4"), "adapter", out)
    read: Any = AutoModelForCausalLM.from_pretrained
    base = read(out / "base", trust_remote_code=True, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    live = read(tmp_path / "live", trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=0.05, atol=0.05)  # bf16


def merge_a_lora(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] += 1


def add_to(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(name).data += 1

    return change


def flip_codes(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data ^ 0x10


@pytest.mark.parametrize(
    ("bits", "change"),
    [
        (None, add_to("model.layers.1.mlp.up_proj.weight")),
        (None, add_to("model.layers.1.input_layernorm.weight")),
        (None, add_to("model.norm.weight")),
        (None, lambda model: model.resize_token_embeddings(101)),
        (NF4_BITS, flip_codes),
    ],
)
def test_a_model_that_is_on_no_disk_is_named(
    dense: Path, tmp_path: Path, bits: dict[str, Any] | None, change: Callable[[Any], object]
) -> None:
    base = load(dense, bits)
    change(base)
    train(base, tmp_path, NONE)
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("checkpoint-4 save_model", export, contents, "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["dense", "."])
def test_a_model_with_a_relative_path_is_exported_from_elsewhere(
    dense: Path, tmp_path: Path, name: str
) -> None:
    with chdir(dense.parent if name == "dense" else dense):
        train(plain(Path(name)), tmp_path)
    out = tmp_path / "exported"
    export(find_contents(tmp_path / "checkpoint-4"), "hf", out)
    assert read_tensors(out).keys() == read_tensors(tmp_path / "live").keys()
    for card in (out, tmp_path / "live"):
        assert "# dense, pruned" in (card / "README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (edit_tensors(merge_a_lora), "dense source"),
        (edit("config.json", rope_theta=7.0), "dense source"),
        (remove("../checkpoint-4/pruning/lora-00001.safetensors"), "lora-00001"),
    ],
)
def test_what_has_changed_since_is_named(
    dense: Path, tmp_path: Path, spoil: Spoil, names: str
) -> None:
    train(plain(dense), tmp_path)
    spoil(dense)
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name(f"checkpoint-4 {names}", export, contents, "hf", tmp_path / "out")


def test_an_evaluation_says_that_a_checkpoint_needs_an_export(dense: Path, tmp_path: Path) -> None:
    train(plain(dense), tmp_path)
    for folder in (tmp_path / "checkpoint-4", tmp_path):
        must_name("checkpoint launch/export.py", find_model, str(folder))


def test_an_adapter_cannot_hold_what_trains_beside_lora(dense: Path, tmp_path: Path) -> None:
    train(plain(dense), tmp_path, modules_to_save=["lm_head"])
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("lm_head.weight", export, contents, "adapter", tmp_path / "out")
