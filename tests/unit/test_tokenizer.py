"""Loads tokenizers of pretrained models. Sentencepiece alone is enough, and a damaged file is one line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from loraprune_ds.export.huggingface import copy_tokenizer
from loraprune_ds.model.embedded import embedded_text
from loraprune_ds.model.tokenizer import load_tokenizer
from tests.refusals import refused

# Tokenizers differ at repeated spaces, digits, an accent, and letters that only bytes can spell. No text begins with a
# space, where LlamaTokenizer leaves out the extra one that sentencepiece puts before every text.
TEXTS = ["Hello  world 123", "élan\n\n x\tüß😀 end ", "x", "\nreturn", ""]
BOS = 1


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_model(request: pytest.FixtureRequest) -> bytes:
    """Trains a small model with the settings of LLaMA's."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("".join(embedded_text()[:12]).splitlines()),
        model_writer=model,
        model_type=request.param,
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_folder(folder: Path, model: bytes, *, model_type: str = "llama", **tokenizer_config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 500}))
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "no tokenizer_config.json": {},
    "mistral": {"model_type": "mistral"},
    "the class of early LLaMA conversions": {"tokenizer_class": "LLaMATokenizer"},
    "their empty names": {"tokenizer_class": "LLaMATokenizer", "bos_token": "", "eos_token": "", "unk_token": ""},
    "the usual": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_sentencepiece_alone_gives_its_own_tokens_after_bos(
    config: dict[str, Any], sentencepiece_model: bytes, tmp_path: Path
) -> None:
    reference = SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = load_tokenizer(write_folder(tmp_path, sentencepiece_model, **config))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [BOS, *reference.encode(text)], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, 2)


def test_a_config_without_bos_gets_none(sentencepiece_model: bytes, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, sentencepiece_model, add_bos_token=False))
    assert BOS not in tokenizer("Hello")["input_ids"]


BROKEN: dict[str, dict[str, str]] = {
    "only a model config": {"config.json": '{"model_type": "llama"}'},
    "tokenizer.json of another make": {"tokenizer.json": "[]"},
    "tokenizer.json the library refuses": {"tokenizer.json": '{"added_tokens": [], "model": {"type": "BPE"}}'},
    "an empty sentencepiece file": {"tokenizer.model": ""},
    "a pointer to a sentencepiece file": {"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"},
    "tokenizer_config.json cut short": {"tokenizer.json": "{}", "tokenizer_config.json": "{"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_tokenizer_is_one_line_that_names_the_folder(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert str(tmp_path) in refused(load_tokenizer, tmp_path)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_export_begins_texts_like_the_source(
    tmp_path: Path, sentencepiece_model: bytes, config: dict[str, Any]
) -> None:
    """AutoTokenizer reads other tokens from tokenizer.model alone."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    write_folder(source, sentencepiece_model, **config)
    copy_tokenizer(source, out)
    (out / "config.json").write_text((source / "config.json").read_text())
    exported, dense = AutoTokenizer.from_pretrained(out), load_tokenizer(source)
    for text in (*TEXTS, "a</s>b  c", "</s> x"):
        assert exported(text)["input_ids"] == dense(text)["input_ids"], text
    assert exported("x")["input_ids"][0] == BOS
