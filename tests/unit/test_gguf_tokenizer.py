"""Reads the keys of tokenizers in GGUF files. A heavy test asks llama.cpp for the same tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from transformers import AutoTokenizer

from loraprune_ds.errors import UserError
from loraprune_ds.export.gguf_tokenizer import NOT_COMPOSED, add_tokenizer, read_vocabulary
from tests.gguf_cases import PRE_TOKENIZERS, byte_level_tokenizer, sentencepiece_tokenizer

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


def test_qwen2_composes_characters_and_llama_cpp_does_not(tmp_path: Path) -> None:
    folder = byte_level_tokenizer(tmp_path / "tokenizer", VOCAB, "qwen2")
    assert json.loads((folder / "tokenizer.json").read_text())["normalizer"] == {"type": "NFC"}
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    assert add_tokenizer(writer, folder, VOCAB) == [NOT_COMPOSED]


def test_bos_is_seen_by_what_the_tokenizer_does(tmp_path: Path) -> None:
    assert keys_of(byte_level_tokenizer(tmp_path / "tokenizer", VOCAB, bos=True))["ggml.add_bos_token"]


def test_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_tokenizer(tmp_path / "tokenizer", VOCAB)
    keys = keys_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(VOCAB))
    assert keys["ggml.token_type"][:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert keys["ggml.add_bos_token"]
    assert keys["ggml.add_space_prefix"]
    scores = keys["ggml.scores"]
    assert scores[300] > scores[301] > scores[302]  # as sentencepiece learned them, best first


def test_merges_give_the_order_that_sentencepiece_had(tmp_path: Path) -> None:
    """Has only tokenizer.json, as after `save_pretrained` of transformers 5."""
    folder = sentencepiece_tokenizer(tmp_path / "tokenizer", VOCAB)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fast")
    assert not (tmp_path / "fast" / "tokenizer.model").exists()
    exact, rebuilt = read_vocabulary(folder), read_vocabulary(tmp_path / "fast")
    assert rebuilt.tokens == exact.tokens
    assert rebuilt.types[3:] == exact.types[3:]
    merged = [i for i, token in enumerate(exact.tokens) if exact.types[i] == TokenType.NORMAL and len(token) > 1]
    assert len(merged) > 50
    assert sorted(merged, key=lambda i: -rebuilt.scores[i]) == sorted(merged, key=lambda i: -exact.scores[i])


def edit(folder: Path, change: Any) -> Path:
    path = folder / "tokenizer.json"
    fast = json.loads(path.read_text())
    change(fast)
    path.write_text(json.dumps(fast))
    return folder


def test_merges_that_no_sentencepiece_model_has(tmp_path: Path) -> None:
    folder = sentencepiece_tokenizer(tmp_path / "tokenizer", VOCAB)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fast")
    edit(tmp_path / "fast", lambda fast: fast["model"]["merges"].pop(20))
    with pytest.raises(UserError, match="its merges are not those of a sentencepiece model; formats that can: hf"):
        read_vocabulary(tmp_path / "fast")


def test_more_than_the_embedding_has_rows(tmp_path: Path) -> None:
    folder = byte_level_tokenizer(tmp_path / "tokenizer", VOCAB)
    with pytest.raises(UserError, match=f"{folder}: its tokenizer has 39. tokens, its model only 300"):
        keys_of(folder, 300)


def unknown_split(fast: dict[str, Any]) -> None:
    fast["pre_tokenizer"]["add_prefix_space"] = True


def normalized(fast: dict[str, Any]) -> None:
    fast["normalizer"] = {"type": "NFKC"}


@pytest.mark.parametrize("change", [unknown_split, normalized])
def test_a_way_to_prepare_text_without_a_name(change: Any, tmp_path: Path) -> None:
    folder = edit(byte_level_tokenizer(tmp_path / "tokenizer", VOCAB), change)
    with pytest.raises(UserError, match=r"tokenizer\.json: llama\.cpp has no name for the way .* can: hf, adapter"):
        keys_of(folder)


def test_unigram_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_tokenizer(tmp_path / "tokenizer", 330, "unigram")
    with pytest.raises(UserError, match=r"tokenizer\.model: only sentencepiece models of type BPE"):
        read_vocabulary(folder)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path / 'model'} has no tokenizer that can be read"):
        keys_of(tmp_path / "model")


def test_more_around_a_text_than_bos_and_eos(tmp_path: Path) -> None:
    def two(fast: dict[str, Any]) -> None:
        fast["post_processor"]["single"].insert(0, fast["post_processor"]["single"][0])

    folder = edit(byte_level_tokenizer(tmp_path / "tokenizer", VOCAB, bos=True), two)
    with pytest.raises(UserError, match="more than one BOS and EOS"):
        keys_of(folder)
