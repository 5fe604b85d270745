"""Samples and held-out text of `data.path`: every kind of source, and every way to get it wrong."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from loraprune_ds.config import DataConfig, MixtureEntry
from loraprune_ds.config_sources import files_of
from loraprune_ds.pretrained.tokenizer import Starts
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import LoadedData
from loraprune_ds.train.data.sources import at_commits, read_rows, resolve_commits
from tests.support.refusals import must_name
from tests.support.texts import (
    INSTRUCTIONS,
    WINDOW,
    documents,
    make_tokenizer,
    numbers,
    words,
    write_json,
)

TOKENIZER = make_tokenizer()


def load(path: Path | str, *, minimum: int = 1, **settings: Any) -> LoadedData:
    config = DataConfig(**({"path": str(path), "window": WINDOW} | settings))
    return load_samples(config, TOKENIZER, minimum=minimum, vocab_size=100, starts=Starts())


def tuned_on(data: LoadedData) -> set[int]:
    return set(data.samples.columns["input_ids"].tolist())


def held_out_ids(data: LoadedData) -> set[int]:
    return set(TOKENIZER(data.held_out)["input_ids"])


# Where text comes from


def test_every_text_file_of_a_folder_is_a_document_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for i in (2, 1):
        (tmp_path / f"{i}.txt").write_text(words(10 * i, 10 * i + 9))
    (tmp_path / "deep/3.txt").write_text(words(40, 49))
    (tmp_path / "notes.md").write_text("not data")
    held_out = tmp_path / "held_out"
    held_out.write_text("w1")
    data = load(tmp_path, held_out=str(held_out), window=32)
    row = data.samples.inputs(numbers(0))["input_ids"][0].tolist()
    assert row == [*range(20, 30), 2, *range(30, 40), 2, *range(50, 60)]
    assert data.held_out == "w1"


def files_at(path: str) -> list[Path] | None:
    return files_of(DataConfig(path=path).sources[0])


def test_a_glob_and_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt", "c.jsonl", "odd[1].txt"):
        (tmp_path / name).write_text('{"text": "w1"}')
    (tmp_path / "sub").mkdir()
    assert files_at(str(tmp_path / "*.txt")) == [
        tmp_path / name for name in ("a.txt", "b.txt", "odd[1].txt")
    ]
    assert files_at(str(tmp_path / "[ab].*")) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert files_at(str(tmp_path / "odd[1].txt")) == [tmp_path / "odd[1].txt"]
    assert files_at(str(tmp_path / "**/c*")) == [tmp_path / "c.jsonl"]
    monkeypatch.chdir(tmp_path / "sub")
    assert files_at("../c*.jsonl") == [Path("../c.jsonl")]
    assert files_at("wikitext") is files_at("some/dataset") is None


def test_a_datasets_name_goes_to_datasets_with_its_files_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[dict[str, str | None]] = [{**row, "source": "s"} for row in INSTRUCTIONS]
    rows[2]["input"] = None  # as real data has them

    def load_dataset(path: str, name: str | None, *, split: str, **more: Any) -> datasets.Dataset:
        assert (path, name, split) == ("someone/data", "small", "train[:10]")
        assert more == {"data_files": ["a.json.gz"], "revision": "c0ffee"}
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings: dict[str, Any] = {"name": "small", "data_files": ["a.json.gz"], "split": "train[:10]"}
    settings["revision"] = "c0ffee"
    data = load("someone/data", **settings, format="instruction", window=40)
    assert len(data.samples) == 9
    assert [data.held_out.count(word) for word in ("w4", "w24", "w50")] == [1, 1, 1]  # the one row


def test_a_data_set_of_the_hub_is_resolved_to_its_commit_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def builder(
        path: str, name: str | None, *, revision: str | None, data_files: None
    ) -> SimpleNamespace:
        asked.append((path, revision))
        return SimpleNamespace(hash=f"commit of {path}")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    local = write_json(tmp_path / "data.json", documents(20))
    config = DataConfig(
        path=[MixtureEntry(str(local)), MixtureEntry("a/b"), MixtureEntry("c/d", revision="v2")]
    )
    commits = resolve_commits(config)
    assert asked == [("a/b", None), ("c/d", "v2")]
    assert commits == {"data.path[1]": "commit of a/b", "data.path[2]": "commit of c/d"}
    assert [source.revision for source in at_commits(config, commits).sources] == [
        None,
        *commits.values(),
    ]
    assert at_commits(DataConfig(path="a/b", revision="v1"), {"data": "x"}).revision == "x"
    must_name("data.revision data.json", load, local, revision="v1")


# What is held out


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_held_out_and_tuning_documents_never_overlap_and_are_all(
    fraction: float, name: str, tmp_path: Path
) -> None:
    data = load(write_json(tmp_path / name, documents(40)), held_out_fraction=fraction)
    assert len(held_out_ids(data)) == pytest.approx(40 * fraction, abs=1)
    assert tuned_on(data).isdisjoint(held_out_ids(data))
    # The last document may lose its end with the tail.
    assert len((tuned_on(data) - {2}) | held_out_ids(data)) >= 39
    assert fraction != 0.1 or held_out_ids(data) == {15, 25, 35, 45}  # every tenth


def test_the_fraction_is_of_the_text_and_not_of_the_number_of_documents(tmp_path: Path) -> None:
    rows = [{"text": "w1 " * (1 + 7 * i % 50)} for i in range(300)] + [{"text": ""}] * 300
    data = load(write_json(tmp_path / "data.json", rows), held_out_fraction=0.2)
    assert data.held_out.count("w1") == pytest.approx(
        0.2 * sum(1 + 7 * i % 50 for i in range(300)), rel=0.01
    )
    rows = [{"text": ""}, {"text": "w1 " * 100}]
    assert load(write_json(tmp_path / "data.json", rows)).held_out.count("w1") == 10


def test_of_one_big_file_the_end_is_held_out_from_the_start_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"w{i % 20 + 1} {words(30, 34)}\n" for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    data = load(tmp_path / "book.txt", held_out_fraction=0.25)
    assert text.endswith(data.held_out)
    assert text[-len(data.held_out) - 1] == "\n"
    assert len(data.held_out) / len(text) == pytest.approx(0.25, rel=0.02)
    tuned = len(data.samples) * WINDOW + len(TOKENIZER(data.held_out)["input_ids"])
    assert 0 <= len(TOKENIZER(text)["input_ids"]) - tuned < WINDOW
    far = "w1\n" + "w2 " * 5000  # a line end far away does not move the cut
    (tmp_path / "book.txt").write_text(far)
    assert len(load(tmp_path / "book.txt").held_out) == pytest.approx(0.1 * len(far), abs=2)


def test_a_held_out_file_leaves_all_documents_to_tuning(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.json", documents(20))
    (tmp_path / "held_out.raw").write_text(words(40, 45))
    # rows, and no prose
    held_out = write_json(tmp_path / "held_out.jsonl", [{"text": "w40"}, {"text": "w41"}])
    for file, text in ((tmp_path / "held_out.raw", words(40, 45)), (held_out, "w40\n\nw41")):
        data = load(path, held_out=str(file))
        assert data.held_out == text
        assert tuned_on(data) - {2} == set(range(11, 31))


def test_max_samples_cuts_tuning_and_leaves_the_held_out_text_alone(tmp_path: Path) -> None:
    path = write_json(tmp_path / "data.json", documents(40))
    whole, cut = load(path), load(path, max_samples=3)
    assert len(cut.samples) == 3
    assert cut.held_out == whole.held_out
    first = numbers(0, 1, 2)
    assert cut.samples.inputs(first)["input_ids"].equal(whole.samples.inputs(first)["input_ids"])


# What can be wrong


def test_too_few_samples_and_a_tokenizer_of_another_model_are_told(tmp_path: Path) -> None:
    path, held_out = write_json(tmp_path / "data.json", documents(20)), tmp_path / "held_out.txt"
    held_out.write_text("w1")
    there = len(load(path, held_out=str(held_out)).samples)
    assert len(load(path, minimum=there, held_out=str(held_out)).samples) == there
    must_name(
        f"data.json {there} {there + 1}", load, path, minimum=there + 1, held_out=str(held_out)
    )
    must_name("data.max_samples 3", load, path, minimum=5, max_samples=3)
    config = DataConfig(path=str(path), window=WINDOW)
    load_samples(config, TOKENIZER, minimum=1, vocab_size=31, starts=Starts())  # w20 is 30
    must_name(
        "30 vocab_size", load_samples, config, TOKENIZER, minimum=1, vocab_size=30, starts=Starts()
    )


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("a.txt", "", "a.txt"),
        ("a.json", '{"text": "w1"}', "a.json"),
        ("a.json", '[\n{"text": "w1"},\n{"text": }]', "a.json 3 10"),  # line and column
        ("a.jsonl", '{"text": "w1"}\n\n{"text"\n', "a.jsonl 3 7"),
        ("a.jsonl", '{"text": "w1"}\n"w2"', "a.jsonl 2"),
        ("a.json", '[{"text": "w1"}, 3]', "a.json 1"),
        ("a.json", '[{"body": "w1"}]', "data.text_field a.json 'text' body"),
        ("a.jsonl", '{"text": null}\n{"text": ["w1"]}', "a.jsonl 2 'text'"),
        # beyond what Python parses
        ("a.json", '[{"text": "w1"},\n{"a": ' + "1" * 5_000 + "}]", "a.json 2"),
        ("a.jsonl", '{"text": "w1"}\n{"a": ' + "[" * 100_000, "a.jsonl 2"),
        ("a.txt", "w1 \xff", "a.txt 3"),  # byte
        ("a.jsonl", '{"text": "\xff"}', "a.jsonl 10"),
        ("a.csv", "text\nw1", "a.csv"),
    ],
)
def test_a_bad_file_is_named(name: str, content: str, names: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    must_name(names, load, tmp_path / name)


def test_a_byte_order_mark_is_dropped_and_half_of_a_character_replaced(tmp_path: Path) -> None:
    """JSON can hold half of one, where a text was cut. Tokenizers take none."""
    text = b'\xef\xbb\xbf{"text": "w1 \\ud83d w2 \\ude00 \\uD83D\\uDE00"}\n'
    (tmp_path / "a.jsonl").write_bytes(text)
    (row,) = read_rows(DataConfig(path=str(tmp_path / "a.jsonl")).sources[0])
    assert row == {"text": "w1 ? w2 ? \N{GRINNING FACE}"}


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "./missing", "here/missing.txt", "here/*.txt", "here", "someone/data"]
)
def test_a_path_that_is_not_there_is_named_and_not_downloaded(path: str, tmp_path: Path) -> None:
    must_name(named := path.replace("here", str(tmp_path)), load, named)


def test_the_held_out_file_is_checked_too(tmp_path: Path) -> None:
    path, held_out = write_json(tmp_path / "data.json", documents(20)), tmp_path / "held.txt"
    must_name("data.held_out held.txt", load, path, held_out=str(held_out))
    held_out.write_text("")
    must_name("held.txt", load, path, held_out=str(held_out))
    held_out.write_text("w1")
    must_name("data.held_out", load, tmp_path, held_out=str(held_out))  # which is tuned on, too
    must_name(
        "data.held_out",
        load,
        tmp_path / "*.txt",
        held_out=str(tmp_path / ".." / tmp_path.name / "held.txt"),
    )
    other = write_json(tmp_path / "held_out.json", [{"a": "b"}])
    must_name("data.text_field held_out.json", load, path, held_out=str(other))


@pytest.mark.parametrize(
    ("path", "settings", "names"),
    [
        (
            "data.json",
            {"response_field": "output"},
            "data.response_field 'output' input, instruction",
        ),
        ("data.json", {"input_field": "context"}, "data.input_field 'context'"),
        ("few.json", {}, "data.held_out_fraction few.json"),
        ("a.txt", {}, "data.format a.txt"),
        ("embedded", {}, "data.format data.path"),
        ("data.json", {"data_files": ["a.jsonl"]}, "data.data_files"),
    ],
)
def test_instructions_need_their_fields_and_enough_rows(
    path: str, settings: dict[str, Any], names: str, tmp_path: Path
) -> None:
    write_json(tmp_path / "data.json", INSTRUCTIONS)
    write_json(tmp_path / "few.json", INSTRUCTIONS[:4])
    (tmp_path / "a.txt").write_text("w1")
    where = path if path == "embedded" else tmp_path / path
    must_name(names, load, where, format="instruction", window=64, **settings)


def test_instructions_without_an_input_field(tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "response": "w50"} for i in range(10)]
    path = write_json(tmp_path / "data.json", rows)
    assert len(load(path, format="instruction", input_field=None, window=64).samples) == 9
    rows[3]["input"] = "w33"  # one row that has it is enough to know the field
    assert len(load(write_json(path, rows), format="instruction", window=64).samples) == 9
