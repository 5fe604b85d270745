"""Tests the parts of an exported folder: merged weights, weight files, index, tokenizer, card, and the whole folder."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from loraprune_ds import files
from loraprune_ds.checkpoint.state import Origin, Totals
from loraprune_ds.export.huggingface import begin, copy_tokenizer, finish_folder, publish
from loraprune_ds.export.model_card import card_of_state, write_model_card
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.weight_files import write_index, write_weight_file
from tests.oracle.models import make_tokenizer
from tests.support.export_cases import CASES, dense_model, exported_config, model_card
from tests.support.families import tiny_model
from tests.support.published import sizes_of
from tests.support.refusals import must_name

MHA = CASES[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, lora_a, lora_b = torch.randn(7, 5).to(dtype), torch.randn(3, 5), torch.randn(7, 3)
    exact = weight.double() + 2.5 * lora_b.double() @ lora_a.double()
    merged = merge_lora(weight, lora_a, lora_b, 2.5, dtype)
    assert merged.dtype == dtype
    # Rounding to nearest moves a value by at most half an eps. The fp32 sum of three products adds a few fp32 eps.
    limit = 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((merged.double() - exact).abs() <= limit).all()


def test_weight_files_can_be_written_in_any_order_from_views_of_one_buffer(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    tensors = [
        {"model.layers.0.a": flat[:6].view(2, 3), "model.layers.0.b": flat[6:10]},
        {"model.layers.1.a": flat[10:16].view(2, 3).t()},
        {"model.norm.weight": flat[16:].bfloat16()},
    ]
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for index in (2, 0, 1):
        write_weight_file(tmp_path / names[index], tensors[index])
    write_index(tmp_path, names)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 16 * 4 + 4 * 2
    for file, weight_file in zip(names, tensors, strict=True):
        for name, tensor in weight_file.items():
            assert index["weight_map"].pop(name) == file
            loaded = load_file(tmp_path / file)[name]
            assert torch.equal(loaded, tensor)
            assert loaded.dtype == tensor.dtype
    assert not index["weight_map"]
    with pytest.raises(AssertionError, match="two files"):
        write_index(tmp_path, [names[0], names[0]])


def test_an_export_needs_a_new_or_an_empty_folder(tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    (begin(out) / "config.json").touch()
    publish(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    must_name(str(out), begin, out)
    assert begin(tmp_path / "new" / "model").is_dir()


def test_an_export_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}"))
    )
    staging = begin(tmp_path / "out")
    (staging / "base").mkdir()
    written = [staging / "config.json", staging / "base" / "model.safetensors"]
    for path in written:
        path.touch()
    publish(tmp_path / "out")
    assert {*map(str, written), f"{staging / 'base'}"} <= {*synced}
    assert synced[-2:] == [f"{staging}", f"{tmp_path}"]


def test_tokenizer_files_are_copied_unchanged(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    copied = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json"}
    copied |= {"added_tokens.json", "merges.txt", "spiece.model"}
    for name in copied | {"model.safetensors", "config.json", "training_args.bin"}:
        (source / name).write_bytes(b"\x00\xff" + name.encode())
    config = '{"tokenizer_class":  "LlamaTokenizer"}'
    (source / "tokenizer_config.json").write_text(config)
    copy_tokenizer(source, out)
    assert {path.name for path in out.iterdir()} == copied | {"tokenizer_config.json"}
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)
    assert (out / "tokenizer_config.json").read_text() == config


def test_names_only_transformers_5_knows_are_replaced(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """Replaces an unknown class, and a list where 4.57 expects a mapping. 4.57 raises on both (tried by hand)."""
    config = json.loads((tiny_tokenizer / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "TokenizersBackend"
    config["extra_special_tokens"] = ["import"]
    (tiny_tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    copy_tokenizer(tiny_tokenizer, tmp_path)
    copied = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert copied["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert copied["additional_special_tokens"] == ["import"]
    assert "extra_special_tokens" not in copied
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_tokenizer, tmp_path))
    for text in ("an import statement", "é\n"):
        assert before(text).input_ids == after(text).input_ids
    assert before.all_special_tokens == after.all_special_tokens


@pytest.fixture
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(300).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dense_model(MHA).config.to_dict()))
    return folder


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("mistral", {"temperature": 0.6, "do_sample": True})]
)
def test_an_export_is_complete(
    tmp_path: Path, tiny_tokenizer: Path, family: str, settings: dict[str, object]
) -> None:
    if settings:
        (tiny_tokenizer / "generation_config.json").write_text(json.dumps(settings))
    case = next(case for case in CASES if case.becomes == f"pruned_{family}")
    exported, dense, pruned = exported_config(dense_model(case), case)
    finish_folder(tmp_path, exported, tiny_tokenizer, model_card(dense, pruned))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("loraprune_first")["parameters"] == dense.total_numel()
    assert config == exported.config
    code = "modeling_pruned.py"
    shipped = (Path(__file__).parents[2] / "loraprune_ds" / "model" / code).read_text()
    before, _, after = shipped.partition('FAMILY = "llama"')  # the one line that names the family
    assert (tmp_path / code).read_text() == f'{before}FAMILY = "{family}"{after}'
    # else transformers has the settings from config.json
    generation = tmp_path / "generation_config.json"
    assert (json.loads(generation.read_text()) if generation.exists() else {}) == settings
    assert (tmp_path / "README.md").is_file()


@pytest.mark.parametrize("alike", [False, True])
def test_a_card_has_the_sizes_and_asks_for_trust_where_layers_differ(
    tmp_path: Path, alike: bool
) -> None:
    config = sizes_of("llama", 4096, 11008, 32, 32, vocab_size=32000)
    dense = shape_from_config(config, "7B")
    wide, narrow = dense.counts[0], LayerCounts(heads=16, channels=5504)
    pruned = dense.resized(
        (narrow if alike else wide,) * 3 + (narrow,) * 28 + (narrow if alike else wide,)
    )
    write_model_card(tmp_path, model_card(dense, pruned), export_config(config, pruned, "bfloat16"))
    text = (tmp_path / "README.md").read_text()
    removed = 1 - pruned.total_numel() / dense.total_numel()
    assert f"{dense.total_numel():,} | {pruned.total_numel():,} | {removed:.2%}" in text
    assert ("trust_remote_code" in text) == (not alike)
    assert ("| 3–30 | 16 | 16 | 5504 |" if not alike else "| 0–31 | 16 | 16 | 5504 |") in text


def test_the_export_of_a_chain_says_what_the_first_start_was(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    config = sizes_of("llama", 48, 100, 2, 6, num_key_value_heads=3, vocab_size=33)
    dense = start = shape_from_config(config, "dense")
    for channels in (60, 20):
        start = shape_from_config(config, "somewhere")
        cut = start.resized([LayerCounts(heads=3, channels=channels)] * 2)
        card = replace(model_card(start, cut), asked=0.4)
        finish_folder(tmp_path, export_config(config, cut, "float32"), tiny_tokenizer, card)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["loraprune_first"] == {
            "name": "tiny",
            "parameters": dense.total_numel(),
            "linear_parameters": dense.linear_numel(),
        }
    text = (tmp_path / "README.md").read_text()
    assert "| dense | start | pruned | removed |\n|---|---|---|---|---|\n" in text
    for numel in (ModelShape.total_numel, ModelShape.linear_numel):
        left = numel(shape_from_config(config, "cut"))
        assert (
            f"| {numel(dense):,} | {numel(start):,} | {left:,} | {1 - left / numel(dense):.2%} |"
            in text
        )
    assert "| perplexity | not measured | " in text
    assert "40.0 % of the start's linears" in text


@pytest.mark.parametrize(("first", "name"), [({}, "model"), ({"name": "Llama 7B"}, "Llama 7B")])
def test_the_card_of_a_chain_names_its_first_model(first: dict[str, Any], name: str) -> None:
    config = sizes_of("llama", 48, 100, 2, 6, num_key_value_heads=3, vocab_size=33)
    start = shape_from_config(config | ({"loraprune_first": first} if first else {}), "start")
    origin = Origin({"output_dir": "out", "model": {"path": "runs/30/model"}}, 6, 0, False, [])
    kept = [[[0, 2], [1, 3, 4]]] * 2
    state: Any = SimpleNamespace(origin=origin, kept=kept, asked=0.4, step=6, totals=Totals())
    assert card_of_state(state, start).base_model == name


def test_the_other_tokenizers_of_t5s_are_found_in_an_export(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    """As a stock umt5 CodeT5's needs tokenizer.json, and ByT5's has no file that AutoTokenizer would look for."""
    config = tiny_model("t5").config.to_dict()
    dense = shape_from_config(config, "t5")
    cut = dense.resized(
        tuple(LayerCounts((x, min(n, 1)) for x, n in y.items()) for y in dense.counts)
    )
    of_bytes = export_config(config | {"tokenizer_class": "ByT5Tokenizer"}, cut, "float32")
    assert of_bytes.config["model_type"] == "pruned_umt5"
    # vocab.json
    AutoTokenizer.from_pretrained(tiny_tokenizer).backend_tokenizer.model.save(str(tiny_tokenizer))
    (tiny_tokenizer / "tokenizer.json").unlink()
    (tiny_tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    finish_folder(
        tmp_path, export_config(config, cut, "float32"), tiny_tokenizer, model_card(dense, cut)
    )
    before, after = (
        AutoTokenizer.from_pretrained(x)("words").input_ids for x in (tiny_tokenizer, tmp_path)
    )
    assert before == after
