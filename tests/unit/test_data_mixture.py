"""Several sources in `data.path`: their samples, their weights, and every way to get them wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.config import DataConfig, RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import UserError
from loraprune_ds.train.data import loading
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import LoadedData, SampleOrder, mix
from tests.refusals import refused, refuses
from tests.unit.test_data import numbers
from tests.unit.test_data_load import INSTRUCTIONS, documents, write_json
from tests.unit.test_data_tokens import make_tokenizer


def config_of(entries: Any, **settings: Any) -> DataConfig:
    return config_from_dict({"output_dir": "out", "data": {"path": entries, "window": 8} | settings}).data


def load(entries: Any, **settings: Any) -> LoadedData:
    return load_samples(config_of(entries, **settings), make_tokenizer(), minimum=1, vocab_size=100)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_json(tmp_path / "text.jsonl", documents(20)))


@pytest.fixture
def instructions(tmp_path: Path) -> str:
    return str(write_json(tmp_path / "instructions.jsonl", INSTRUCTIONS))


def rows(data: LoadedData) -> list[list[int]]:
    return [data.samples.inputs(numbers(i))["input_ids"][0].tolist() for i in range(len(data.samples))]


def test_the_sources_of_a_mixture_give_what_they_give_alone(text: str, instructions: str) -> None:
    second = {"path": instructions, "format": "instruction"}
    alone = load(text), load(instructions, format="instruction", window=64)
    mixed = load([{"path": text}, second], window=64)
    counts = [len(load(text, window=64).samples), len(alone[1].samples)]
    assert len(mixed.samples) == sum(counts)
    assert rows(mixed)[-counts[1] :] == rows(alone[1])
    assert mixed.held_out == f"{alone[0].held_out}\n\n{alone[1].held_out}"
    assert mixed.epoch is None
    both = load([second, {"path": text}])  # padding is that of ids, whichever comes first
    assert min(map(min, rows(both))) >= 0
    assert both.samples.supervised_counts()[-1] == 7


@pytest.mark.parametrize(
    ("counts", "weights", "times"),
    [
        ((10, 10), (1, 1), (1, 1)),
        ((10, 30), (1, 1), (3, 1)),
        ((10, 30), (3, 1), (9, 1)),
        ((100, 10), (0.5, 0.1), (1, 2)),
        ((7, 5, 1), (7, 5, 1), (1, 1, 1)),
    ],
)
def test_weights_are_the_fractions_of_an_epoch(
    counts: tuple[int, ...], weights: tuple[float, ...], times: tuple[int, ...]
) -> None:
    numbers = mix(counts, weights)
    assert numbers.bincount().tolist() == [n for count, n in zip(counts, times, strict=True) for _ in range(count)]


def test_a_source_may_be_repeated_in_part(text: str, instructions: str) -> None:
    found = mix((3, 10), (0.4, 0.6)).bincount()
    assert found[:3].sum() == pytest.approx(10 / 0.6 * 0.4, abs=0.5)
    assert found[:3].max() - found[:3].min() <= 1
    entries = [{"path": text, "weight": 1}, {"path": instructions, "format": "instruction", "weight": 2.0}]
    assert load(entries, window=64).epoch_length == 9 + round(9 / 2)


def test_steps_see_the_samples_of_an_epoch() -> None:
    epoch = mix((2, 8), (1, 1))
    order = SampleOrder(len(epoch), 4, 7, epoch)
    assert torch.cat([order.batch(step) for step in range(4)]).sort().values.equal(epoch.sort().values)
    assert epoch[SampleOrder(len(epoch), 4, 7).batch(1)].equal(order.batch(1))


def test_an_entry_has_what_it_does_not_give_from_data() -> None:
    config = config_of([{"path": "a", "format": "chat"}, {"path": "b", "split": "test"}], text_field="body", name="x")
    first, second = config.sources
    assert (first.format, first.split, first.text_field, first.name) == ("chat", "train", "body", "x")
    assert (second.format, second.split, second.section) == ("text", "test", "data.path[1]")
    run = RunConfig("out", data=config)
    assert config_from_dict(run.to_dict()) == run


def test_each_source_gives_max_samples(instructions: str) -> None:
    second = {"path": instructions, "format": "instruction"}
    assert len(load([second, second], window=64, max_samples=5).samples) == 10


def test_a_held_out_file_of_text_stands_beside_instructions_that_are_packed(instructions: str, tmp_path: Path) -> None:
    held_out = write_json(tmp_path / "held_out.jsonl", [{"text": "w1 w2 w3"}])
    entries = [{"path": instructions, "format": "instruction"}]
    assert load(entries, window=64, packing=True, held_out=str(held_out)).held_out == "w1 w2 w3"


WRONG = {
    "empty": ([], r"data\.path, or a path in it, is empty"),
    "a path alone": (["a.txt"], r"data\.path\[0\] must be a section of keys, got 'a\.txt'"),
    "no path": ([{"weight": 1}], r"the key data\.path\[0\]\.path is missing"),
    "a weight of 0": ([{"path": "a"}, {"path": "b", "weight": 0}], r"data\.path\[1\]\.weight must be greater than 0;"),
    "an unknown key": ([{"path": "a", "wieght": 1}], r"unknown key data\.path\[0\]\.wieght; known keys there: path,"),
    "one weight": ([{"path": "a"}, {"path": "b", "weight": 1}], r"data\.path\[1\]\.weight: data\.path\[0\] has no w"),
    "no file": ([{"path": "a.txt"}], r"data\.path\[0\]\.path: a\.txt does not exist"),
    "no conversations": ([{"path": "embedded", "format": "instruction"}], r"data\.path\[0\]\.format instruction needs"),
}


def test_an_endless_epoch_is_refused(text: str, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LONGEST_EPOCH", 1000)
    entries = [{"path": text, "weight": 0.001}, {"path": instructions, "format": "instruction", "weight": 2}]
    refuses(r"^data\.path: by these weights an epoch has 2e\+03 samples, as each is", load, entries, window=64)
    entries[0]["weight"] = 1
    assert load(entries, window=64).epoch_length < 1000


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG)
def test_a_bad_entry_is_one_line_that_names_it(entries: list[Any], message: str) -> None:
    assert re.match(message, refused(load, entries))


def test_what_all_entries_lack_stands_beside_the_list(text: str, tmp_path: Path) -> None:
    """An entry's null means that it is not given."""
    path = str(write_json(tmp_path / "pairs.jsonl", [{"instruction": "w1", "response": "w2"}] * 20))
    entries = [{"path": text}, {"path": path, "format": "instruction", "input_field": None}]
    with pytest.raises(UserError, match=r"data\.path\[1\]\.input_field: .*'input' \(data\.input_field null: there is"):
        load(entries, window=64)
    assert load(entries, window=64, input_field=None).epoch_length == 19


def test_a_source_without_samples_can_have_no_weight(text: str, tmp_path: Path) -> None:
    short = str(write_json(tmp_path / "short.jsonl", [{"text": "w1"}] * 2))
    entries = [{"path": text, "weight": 1}, {"path": short, "weight": 1}]
    refuses(r"data\.path\[1\]\.path: .*short\.jsonl gives no sample", load, entries, held_out_fraction=0.5)
