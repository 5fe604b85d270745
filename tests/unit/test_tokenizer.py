"""Loads tokenizers of pretrained models, and reads their keys in GGUF files. A heavy test asks llama.cpp for tokens."""

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from loraprune_ds.export.gguf_tokenizer import NOT_COMPOSED, add_tokenizer, read_vocabulary
from loraprune_ds.export.huggingface import copy_tokenizer
from loraprune_ds.pretrained.sources import embedded_text
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from tests.support import gguf_cases
from tests.support.gguf_cases import (
    PRE_TOKENIZERS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    unigram_tokenizer,
    without_sentencepiece,
)
from tests.support.refusals import must_name

# Tokenizers differ at repeated spaces, digits, an accent, and letters that only bytes can spell. No text begins with a
# space, where LlamaTokenizer leaves out the extra one that sentencepiece puts before every text.
TEXTS = ["Hello  world 123", "élan\n\n x\tüß😀 end ", "x", "\nreturn", ""]
BOS = 1


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_model(request: pytest.FixtureRequest) -> bytes:
    """Trains a small model with the settings of LLaMA's."""
    model = io.BytesIO()
    lines = iter("".join(embedded_text()[:12]).splitlines())
    settings = gguf_cases.SENTENCEPIECE | {
        "model_type": request.param,
        "vocab_size": 500,
        "split_digits": True,
    }
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **settings)
    return model.getvalue()


def write_folder(
    folder: Path, model: bytes, *, model_type: str = "llama", **tokenizer_config: Any
) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 500}))
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


CONFIGS: dict[str, dict[str, Any]] = {
    "no tokenizer_config.json": {},
    "mistral": {"model_type": "mistral"},
    "the class of early LLaMA conversions": {"tokenizer_class": "LLaMATokenizer"},
    "their empty names": {
        "tokenizer_class": "LLaMATokenizer",
        "bos_token": "",
        "eos_token": "",
        "unk_token": "",
    },
    "the usual": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": True},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_sentencepiece_gives_its_own_tokens_in_source_and_export(
    config: dict[str, Any], sentencepiece_model: bytes, tmp_path: Path
) -> None:
    """AutoTokenizer reads other tokens from tokenizer.model alone."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    reference = SentencePieceProcessor(model_proto=sentencepiece_model)
    tokenizer = load_tokenizer(write_folder(source, sentencepiece_model, **config))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [BOS, *reference.encode(text)], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), (
            text
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, 2)
    copy_tokenizer(source, out)
    (out / "config.json").write_text((source / "config.json").read_text())
    exported = AutoTokenizer.from_pretrained(out)
    for text in (*TEXTS, "a</s>b  c", "</s> x"):
        assert exported(text)["input_ids"] == tokenizer(text)["input_ids"], text


def test_a_config_without_bos_gets_none(sentencepiece_model: bytes, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path, sentencepiece_model, add_bos_token=False))
    assert BOS not in tokenizer("Hello")["input_ids"]


BROKEN: dict[str, dict[str, str]] = {
    "only a model config": {"config.json": '{"model_type": "llama"}'},
    "tokenizer.json of another make": {"tokenizer.json": "[]"},
    "tokenizer.json the library refuses": {
        "tokenizer.json": '{"added_tokens": [], "model": {"type": "BPE"}}'
    },
    "an empty sentencepiece file": {"tokenizer.model": ""},
    "a pointer to a sentencepiece file": {
        "tokenizer.model": "version https://git-lfs.github.com/spec/v1\n"
    },
    "tokenizer_config.json cut short": {"tokenizer.json": "{}", "tokenizer_config.json": "{"},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_tokenizer_is_one_line_that_names_the_folder(
    files: dict[str, str], tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    must_name(str(tmp_path), load_tokenizer, tmp_path)


# The keys of tokenizers in GGUF files

VOCAB = 400


def keys_of(folder: Path, vocab_size: int = VOCAB) -> dict[str, Any]:
    """Returns the keys about the tokenizer, without their common prefix."""
    path = folder.with_suffix(".gguf")
    writer = GGUFWriter(path, "llama")
    add_tokenizer(writer, folder, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = GGUFReader(path).fields
    prefix = "tokenizer."
    return {k.removeprefix(prefix): f.contents() for k, f in fields.items() if k.startswith(prefix)}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level(pre: str, tmp_path: Path) -> None:
    keys = keys_of(byte_level_tokenizer(tmp_path / "tokenizer", VOCAB, pre))
    fast = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert (keys["ggml.model"], keys["ggml.pre"]) == ("gpt2", pre)
    assert keys["ggml.merges"] == [" ".join(pair) for pair in fast["model"]["merges"]]
    for token, index in fast["model"]["vocab"].items():
        assert keys["ggml.tokens"][index] == token
    types = dict(zip(keys["ggml.tokens"], keys["ggml.token_type"], strict=True))
    assert types["</s>"] == types["<|end|>"] == TokenType.CONTROL
    assert types["statement names"] == TokenType.USER_DEFINED
    assert types["Ġimport"] == TokenType.NORMAL
    assert keys["ggml.token_type"][-1] == TokenType.UNUSED
    assert len(keys["ggml.tokens"]) == len(set(keys["ggml.tokens"])) == VOCAB
    ids = {name: keys[f"ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")}
    assert ids == {"unknown": 0, "bos": 1, "eos": 2}
    assert "ggml.padding_token_id" not in keys
    assert keys["chat_template"] == "{{ messages[0].content }}"
    assert not keys["ggml.add_bos_token"]
    assert not keys["ggml.add_eos_token"]


def test_bos_and_unicode_composition_are_told(tmp_path: Path) -> None:
    """A Qwen2 composes characters and llama.cpp does not."""
    assert keys_of(byte_level_tokenizer(tmp_path / "bos", VOCAB, bos=True))["ggml.add_bos_token"]
    folder = byte_level_tokenizer(tmp_path / "tokenizer", VOCAB, "qwen2")
    assert json.loads((folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    assert add_tokenizer(GGUFWriter(tmp_path / "model.gguf", "llama"), folder, VOCAB) == [
        NOT_COMPOSED
    ]


def test_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_tokenizer(tmp_path / "tokenizer", VOCAB)
    keys = keys_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(VOCAB))
    assert keys["ggml.token_type"][:4] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.CONTROL,
        TokenType.BYTE,
    ]
    assert keys["ggml.add_bos_token"]
    assert keys["ggml.add_space_prefix"]
    scores = keys["ggml.scores"]
    assert scores[300] > scores[301] > scores[302]  # as sentencepiece learned them, best first


def test_unigrams(tmp_path: Path) -> None:
    """An export has them in tokenizer.json, though the source has T5's spiece.model alone. llama.cpp lacks them."""
    source, folder = unigram_tokenizer(tmp_path / "source", VOCAB), tmp_path / "out"
    folder.mkdir()
    copy_tokenizer(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = SentencePieceProcessor(model_file=str(source / "spiece.model"))
    for text in TEXTS[:-1]:
        assert tokenizer(text)["input_ids"] == [*pieces.encode(text), 1], text
    must_name("out hf, adapter", keys_of, folder)


def test_merges_give_the_order_that_sentencepiece_had(tmp_path: Path) -> None:
    """Has only tokenizer.json, as after `save_pretrained` of transformers 5."""
    fast = without_sentencepiece(tmp_path / "fast", VOCAB)
    assert not (fast / "tokenizer.model").exists()
    exact, rebuilt = read_vocabulary(tmp_path / "spm"), read_vocabulary(fast)
    assert rebuilt.tokens == exact.tokens
    assert rebuilt.types[3:] == exact.types[3:]
    merged = [
        i
        for i, token in enumerate(exact.tokens)
        if exact.types[i] == TokenType.NORMAL and len(token) > 1
    ]
    assert len(merged) > 50
    assert sorted(merged, key=lambda i: -rebuilt.scores[i]) == sorted(
        merged, key=lambda i: -exact.scores[i]
    )


# Refusals


BYTE_LEVEL = partial(byte_level_tokenizer, vocab=VOCAB, bos=True)
UNIGRAM = partial(sentencepiece_tokenizer, vocab=330, model_type="unigram")


def two_bos(fast: dict[str, Any]) -> None:
    single = fast["post_processor"]["single"]
    single.insert(0, single[0])


@pytest.mark.parametrize(
    ("make", "change", "names"),
    [
        (BYTE_LEVEL, None, "39 300"),  # tokens
        (BYTE_LEVEL, two_bos, "BOS EOS hf, adapter"),
        (
            BYTE_LEVEL,
            lambda fast: fast["pre_tokenizer"].update(add_prefix_space=True),
            "tokenizer.json hf, adapter",
        ),
        (
            BYTE_LEVEL,
            lambda fast: fast.update(normalizer={"type": "NFKC"}),
            "tokenizer.json hf, adapter",
        ),
        (
            partial(without_sentencepiece, vocab=VOCAB),
            lambda fast: fast["model"]["merges"].pop(20),
            "merges hf",
        ),
        (UNIGRAM, None, "tokenizer.model BPE"),
        (Path.mkdir, None, "tokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    make: Any, change: Any, names: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    make(folder)
    if change:
        path = folder / "tokenizer.json"
        fast = json.loads(path.read_text())
        change(fast)
        path.write_text(json.dumps(fast))
    must_name(f"{folder} {names}", keys_of, folder, VOCAB if change else 300)


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = byte_level_tokenizer(tmp_path / "tokenizer", VOCAB)
    tokenize = PreTrainedTokenizerFast.__call__

    def change(self: PreTrainedTokenizerFast, text: str, add_special_tokens: bool = True) -> Any:
        text = text.upper() if add_special_tokens else text
        return tokenize(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", change)
    must_name(f"{folder} special tokens hf, adapter", keys_of, folder)
