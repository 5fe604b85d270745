"""A callback's checkpoint is a step: exports and evaluations read it like a step of a run."""

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim import SGD, AdamW
from transformers import AutoModelForCausalLM

from loraprune_ds import PruneConfig, Pruning, linear_names
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json
from loraprune_ds.generate.models import find_model
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import train_and_save
from tests.support.refusals import Spoil, edit, edit_tensors, must_name, remove
from tests.support.resuming import assert_equal_tensors, read_tensors

PRUNE = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)
PATTERNS = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 32}}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "dense", kv_heads=4, dtype="bfloat16")


def train(dense: Path, out: Path, make: Any = AdamW, **lora: Any) -> Pruning:
    """Trains and cuts. Saves a checkpoint, and the model as the live one has it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=linear_names(base), init_lora_weights=False, **lora)
    return train_and_save(get_peft_model(base, config).train(), PRUNE, out, make)


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (AdamW, {}),
        (SGD, {}),  # no state of Adam, but LoRA
        (AdamW, {"use_rslora": True, **PATTERNS}),
        (AdamW, {"modules_to_save": ["lm_head", "model.norm"]}),
    ],
)
def test_a_checkpoint_is_exported_like_the_live_model(
    dense: Path, tmp_path: Path, make: Any, lora: dict[str, Any]
) -> None:
    train(dense, tmp_path, make, **lora)
    out = tmp_path / "exported"
    assert export(find_contents(tmp_path / "checkpoint-4"), "hf", out) == [
        "taken from checkpoint-4"
    ]
    live = tmp_path / "live"
    assert_equal_tensors(read_tensors(out), read_tensors(live))
    config = read_json(out / "config.json")
    del config["use_cache"]  # trainers switch it off
    assert config == read_json(live / "config.json")
    assert (out / "README.md").read_text() == (live / "README.md").read_text()


def test_its_adapter_keeps_ranks_and_scalings(dense: Path, tmp_path: Path) -> None:
    train(dense, tmp_path, **PATTERNS)
    out = tmp_path / "adapter"
    export(find_contents(tmp_path / "checkpoint-4"), "adapter", out)
    load: Any = AutoModelForCausalLM.from_pretrained
    base = load(out / "base", trust_remote_code=True, dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    live = load(tmp_path / "live", trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=0.05, atol=0.05)  # bf16


def merge_a_lora(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] += 1


def add_to(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_parameter(name).data += 1

    return change


@pytest.mark.parametrize(
    "change",
    [
        add_to("model.layers.1.mlp.up_proj.weight"),
        add_to("model.layers.1.input_layernorm.weight"),
        add_to("model.norm.weight"),
        lambda model: model.resize_token_embeddings(101),
    ],
)
def test_a_model_that_is_on_no_disk_is_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def load_then_change(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        change(model)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_then_change)
    train(dense, tmp_path)
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("checkpoint-4 save_model", export, contents, "hf", tmp_path / "out")


@pytest.mark.parametrize("name", ["dense", "."])
def test_a_model_with_a_relative_path_is_exported_from_elsewhere(
    dense: Path, tmp_path: Path, name: str
) -> None:
    with chdir(dense.parent if name == "dense" else dense):
        train(Path(name), tmp_path)
    out = tmp_path / "exported"
    export(find_contents(tmp_path / "checkpoint-4"), "hf", out)
    assert read_tensors(out).keys() == read_tensors(tmp_path / "live").keys()
    for card in (out, tmp_path / "live"):
        assert "# dense, pruned" in (card / "README.md").read_text()


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda dense: edit_tensors(merge_a_lora)(dense), "dense source"),
        (lambda dense: edit("config.json", rope_theta=7.0)(dense), "dense source"),
        (
            lambda dense: remove("../checkpoint-4/pruning/lora-00001.safetensors")(dense),
            "lora-00001",
        ),
    ],
)
def test_what_has_changed_since_is_named(
    dense: Path, tmp_path: Path, spoil: Spoil, names: str
) -> None:
    train(dense, tmp_path)
    spoil(dense)
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name(f"checkpoint-4 {names}", export, contents, "hf", tmp_path / "out")


def test_an_evaluation_says_that_a_checkpoint_needs_an_export(dense: Path, tmp_path: Path) -> None:
    train(dense, tmp_path)
    for folder in (tmp_path / "checkpoint-4", tmp_path):
        must_name("checkpoint launch/export.py", find_model, str(folder))


def test_an_adapter_cannot_hold_what_trains_beside_lora(dense: Path, tmp_path: Path) -> None:
    train(dense, tmp_path, modules_to_save=["lm_head"])
    contents = find_contents(tmp_path / "checkpoint-4")
    must_name("lm_head.weight", export, contents, "adapter", tmp_path / "out")
