"""Tokens are made once, mapped by all who need them, and made again when anything changes that they depend on."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from loraprune_ds.config import DataConfig
from loraprune_ds.pretrained.tokenizer import Starts
from loraprune_ds.train.data import loading
from loraprune_ds.train.data.loading import cached, load_samples
from loraprune_ds.train.data.samples import LoadedData, Samples
from tests.support.refusals import must_name
from tests.support.texts import INSTRUCTIONS, documents, make_tokenizer, write_json

TOKENIZER, NO_STARTS = make_tokenizer(), Starts()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraprune_ds"


def load(
    path: Path, tokenizer: Any = TOKENIZER, starts: Starts = NO_STARTS, **settings: Any
) -> LoadedData:
    config = DataConfig(**({"path": str(path), "window": 16} | settings))
    return load_samples(config, tokenizer, minimum=1, vocab_size=100, starts=starts)


def reads(path: Path, *arguments: Any, **settings: Any) -> bool:
    """Tells if the data is read again."""
    with patch.object(loading, "read_rows", wraps=loading.read_rows) as read_rows:
        load(path, *arguments, **settings)
    return read_rows.called


@pytest.mark.parametrize("form", ["text", "instruction"])
def test_what_is_found_is_what_was_made(form: str, tmp_path: Path, cache: Path) -> None:
    path = write_json(tmp_path / "data.jsonl", documents(40) if form == "text" else INSTRUCTIONS)
    config = DataConfig(path=str(path), window=40, format=form, held_out_fraction=0.2)  # pyright: ignore[reportArgumentType]
    formats = [loading.make_format(source, TOKENIZER, NO_STARTS) for source in config.sources]
    made = loading._make(config, TOKENIZER, formats, NO_STARTS)
    load(path, window=40, format=form, held_out_fraction=0.2)
    with patch.object(loading, "read_rows"):  # a call would fail
        found = load(path, window=40, format=form, held_out_fraction=0.2)
    assert found.samples.digest() == made.samples.digest()
    assert (found.held_out, found.samples.left_out) == (made.held_out, made.samples.left_out)
    shared = found.samples.columns["labels"] is found.samples.columns["input_ids"]
    assert shared == (form == "text")  # and so is there once
    (file,) = cache.glob("*/samples.pt")  # which is mapped, not read
    assert any(line.endswith(f"{file}\n") for line in Path("/proc/self/maps").open())


def test_line_ends_of_the_held_out_text_and_no_samples_at_all_are_kept() -> None:
    made = LoadedData(Samples.of_windows(torch.zeros(0, 8).int()), "a\r\nb\rc\n")
    for _ in range(2):
        data = cached(DataConfig(), TOKENIZER, NO_STARTS, lambda: made)
        assert (data.held_out, len(data.samples)) == ("a\r\nb\rc\n", 0)


def test_all_that_the_tokens_depend_on_makes_them_again(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.jsonl", documents(40))
    assert reads(path)
    assert not reads(path)
    assert reads(path, window=8)
    assert reads(path, max_samples=3)
    assert reads(path, TOKENIZER, Starts(1))
    assert load(path, starts=Starts(1)).samples.columns["input_ids"][::16].eq(1).all()
    assert reads(path, make_tokenizer(template="<s> $A"))
    with_template = make_tokenizer()
    with_template.chat_template = "{{ messages }}"
    assert reads(path, with_template)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("w1")
    for i in (1, 2):
        os.utime(held_out, (i, i))
        assert reads(path, held_out=str(held_out))
    os.utime(path, (1, 1))
    assert reads(path)
    path.write_text(path.read_text() + '{"text": "w1"}\n')
    os.utime(path, (1, 1))
    assert reads(path)
    assert not reads(path)


def test_a_damaged_file_is_named(tmp_path: Path, cache: Path) -> None:
    path = write_json(tmp_path / "data.jsonl", documents(40))
    load(path)
    (file,) = cache.glob("*/samples.pt")
    content = file.read_bytes()
    for place in (0, content.index(b"Samples"), len(content) - 30):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        must_name(f"data.path {file.parent} delete", load, path)


def test_data_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    path = write_json(tmp_path / "data.jsonl", documents(40))
    must_name("data.text_field 'body'", load, path, text_field="body")
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.write_text("a file")
    must_name(f"data.path {cache}", load, path)
