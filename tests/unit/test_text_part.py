"""Reads, cuts and exports the text part of multimodal models. Differences: as in test_family_proof.py."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loraprune_ds.export.huggingface import begin, finish_folder
from loraprune_ds.files import read_json, write_json
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.text_part import MULTIMODAL, PREFIXES, text_config
from tests.support.export_cases import model_card
from tests.support.families import tiny_config
from tests.support.family_cuts import (
    FEW,
    PROMPT,
    cut_and_export,
    difference,
    load,
    logits,
    reopened,
    with_lora,
)
from tests.support.gguf_cases import byte_level_tokenizer
from tests.support.multimodal import IMAGE, TOWERS, multimodal
from tests.support.refusals import must_name

TOLERANCE = 1e-5
Models = dict[str, tuple[Path, PreTrainedModel]]
pytestmark = pytest.mark.usefixtures("fresh_transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Returns each model and the folder that transformers saved it in."""
    root = tmp_path_factory.mktemp("multimodal")
    made = {outer: (root / outer, multimodal(outer)) for outer in MULTIMODAL}
    for folder, model in made.values():
        model.save_pretrained(folder)
    return made


def edited(source: Path, folder: Path, prefixes: dict[str, str]) -> Path:
    """Copies a folder. Renames the tensors that begin with one of `prefixes`."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        tensors[prefixes.get(found, "") + name.removeprefix(found)] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("outer", MULTIMODAL)
def test_the_text_part_is_read_cut_and_exported(outer: str, models: Models, tmp_path: Path) -> None:
    """It has the logits of the multimodal model, and its export is a stock model of the text class."""
    folder, whole = models[outer]
    pretrained = open_pretrained(folder)
    family, _, tied = TOWERS[outer]
    assert (pretrained.shape.model_type, pretrained.shape.tie_word_embeddings) == (family, tied)
    text = reopened(pretrained)
    words = PROMPT.clamp(max=IMAGE - 1)  # Gemma 4 replaces the token of an image that is not there
    assert difference(logits(text, words), logits(whole, words)) < TOLERANCE
    tuned, counts = with_lora(text, pretrained.config, outer), [FEW] * len(pretrained.shape.counts)
    made = cut_and_export(tuned, tmp_path / "model", *counts)
    stock = load(made.folder)
    assert stock.config.model_type == family
    assert difference(logits(stock), made.logits) < TOLERANCE


def test_other_names_in_the_files(models: Models, tmp_path: Path) -> None:
    folder, whole = models["llava"]
    newer = edited(folder, tmp_path / "newer", dict(zip(PREFIXES[0], PREFIXES[1], strict=True)))
    assert difference(logits(reopened(open_pretrained(newer))), logits(whole)) < TOLERANCE


def test_the_text_of_a_mistral_3_may_be_a_mistral_4(tmp_path: Path) -> None:
    """AutoModelForCausalLM lacks its class."""
    whole = multimodal("mistral3", "mistral4")
    whole.save_pretrained(tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert pretrained.shape.kinds == ("heads", "experts")
    assert difference(logits(reopened(pretrained)), logits(whole)) < TOLERANCE


def test_a_head_that_config_json_calls_tied(models: Models, tmp_path: Path) -> None:
    """transformers keeps both if they differ. Where config.json is silent, the class of mistral3 calls them tied."""
    folder, whole = models["mistral3"]
    silent = edited(folder, tmp_path / "silent", {})
    config = read_json(silent / "config.json")
    write_json(
        silent / "config.json",
        {key: x for key, x in config.items() if key != "tie_word_embeddings"},
    )
    pretrained = open_pretrained(silent)
    assert not pretrained.config["tie_word_embeddings"]
    assert difference(logits(reopened(pretrained)), logits(whole)) < TOLERANCE


@pytest.mark.parametrize("outer", ["qwen3_5", "mistral3"])
def test_the_export_of_a_multimodal_model_knows_what_it_was_cut_from(outer: str) -> None:
    first = {"name": "dense", "parameters": 12}
    config = multimodal(outer).config.to_dict() | {"loraprune_first": first}
    assert shape_from_config(text_config(config, "somewhere"), "somewhere").first == first


def test_the_tokenizer_does_not_depend_on_the_model_type(tmp_path: Path) -> None:
    """AutoTokenizer treats the same files in another way where config.json names another model type."""
    source = byte_level_tokenizer(tmp_path / "source", 400)
    for model_type, pinned in (("gemma3", True), ("gemma3_text", False)):
        write_json(source / "config.json", {"model_type": model_type})
        config = tiny_config("gemma3_text").to_dict()
        shape = shape_from_config(config, "somewhere")
        out = begin(tmp_path / model_type)
        finish_folder(
            out, export_config(config, shape, "float32"), source, model_card(shape, shape)
        )
        assert ("model_input_names" in read_json(out / "tokenizer_config.json")) == pinned


def test_sizes_that_a_published_config_leaves_out() -> None:
    """Gemma 3 4B names few fields of its text part. The others are defaults of the class."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    shape = shape_from_config({"model_type": "gemma3", "text_config": text}, "somewhere")
    assert (shape.head_dim, shape.attention[0].queries, shape.counts[0]["heads"]) == (256, 8, 4)
    assert (shape.vocab_size, shape.tie_word_embeddings) == (262208, True)
    assert shape.total_numel() == 3_880_263_168


def test_what_is_refused(models: Models, tmp_path: Path) -> None:
    llama = tiny_config("llama").to_dict()
    for config, names in [
        ({"model_type": "paligemma", "text_config": llama}, "'paligemma'"),
        ({"model_type": "llava", "text_config": {"model_type": "opt"}}, "'opt'"),
        ({"model_type": "llava", "text_config": llama, "vision_config": 3}, "config.json"),
    ]:
        must_name(f"somewhere {names}", shape_from_config, config, "somewhere")
    for prefixes, names in [
        ({"language_model.": "mind."}, "language_model.model."),
        ({"language_model.model.norm.": "norm."}, "model.norm.weight"),
    ]:
        must_name(names, open_pretrained, edited(models["llava"][0], tmp_path / names, prefixes))
