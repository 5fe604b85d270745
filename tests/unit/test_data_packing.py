"""Several samples in one window give what each gives alone. Several sources in `data.path`, by their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import DataConfig, RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.config_sources import CHATS_FILE
from loraprune_ds.files import read_json
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from loraprune_ds.pretrained.tokenizer import Starts
from loraprune_ds.train.data import loading
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import (
    LoadedData,
    SampleOrder,
    Samples,
    best_fit,
    join_samples,
    mix,
    pack_samples,
    starts_of,
)
from loraprune_ds.train.data.sources import read_rows
from tests.benchmarks.chats import PROMPTS
from tests.support.families import TINY, tiny_model
from tests.support.refusals import must_name
from tests.support.texts import INSTRUCTIONS, documents, make_tokenizer, numbers, write_json

WINDOW = 24
LENGTHS = [5, 17, 9, 24, 3, 11, 7, 2]
# The same sums in another order, and a softmax over masked scores: 6e-8 a term, of some hundred terms.
TOLERANCE = 2e-5


def make_samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (sum(LENGTHS),), generator=generator).int()
    labels = ids.masked_fill(torch.rand(len(ids), generator=generator) < 0.4, IGNORE_INDEX)
    return Samples(
        {"input_ids": ids, "labels": labels}, starts_of(torch.tensor(LENGTHS)), WINDOW, left_out=1
    )


SAMPLES, PACKS = make_samples(), best_fit(LENGTHS, WINDOW)
PACKED = pack_samples(SAMPLES)


def everything(samples: Samples) -> dict[str, Tensor]:
    return samples.inputs(numbers(*range(len(samples))))


def test_every_sample_is_in_one_pack_and_no_pack_is_longer_than_the_window() -> None:
    lengths = torch.randint(1, 101, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = best_fit(lengths, 100)
    assert sorted(sample for pack in packs for sample in pack) == list(range(2000))
    assert max(sum(lengths[sample] for sample in pack) for pack in packs) <= 100
    assert len(packs) <= 1.02 * sum(lengths) / 100
    assert best_fit([10, 10, 10], 10) == [[0], [1], [2]]
    assert best_fit([], 10) == []


def test_the_mask_is_off_at_padding() -> None:
    mask = SAMPLES.attention_mask(numbers(*range(len(SAMPLES))))
    assert mask is not None
    assert mask.sum(1).tolist() == LENGTHS
    assert SAMPLES.attention_mask(numbers(3)) is None  # a sample as long as the window


def test_a_pack_holds_its_samples_one_behind_the_other() -> None:
    inputs, alone = everything(PACKED), everything(SAMPLES)
    assert (len(PACKED), PACKED.left_out) == (len(PACKS), 1)
    for row, pack in enumerate(PACKS):
        positions = [position for i in pack for position in range(LENGTHS[i])]
        assert inputs["position_ids"][row][: len(positions)].tolist() == positions
        ids = torch.cat([alone["input_ids"][i, : LENGTHS[i]] for i in pack])
        assert inputs["input_ids"][row, : len(ids)].equal(ids)
    assert PACKED.count_supervised(torch.arange(len(PACKED))) == SAMPLES.count_supervised(
        torch.arange(len(SAMPLES))
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [family for family in TINY if FAMILIES[family].packs])
def test_losses_of_packed_samples_are_those_of_samples_alone(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "sdpa" and TINY[family].get("attn_logit_softcapping"):
        pytest.skip("sdpa cannot cap scores; such a family gets eager")
    monkeypatch.setattr("loraprune_ds.model.logits.chunk_size", lambda *_, **__: 5)
    model = with_token_losses(tiny_model(family, attn_implementation=attention))
    with torch.no_grad():
        alone = torch.stack(
            [model(**SAMPLES.inputs(numbers(i))).sum() for i in range(len(SAMPLES))]
        )
        packed = model(**everything(PACKED)).sum(1)
        crossing = model(
            **{k: v for k, v in everything(PACKED).items() if k != "position_ids"}
        ).sum(1)
    expected = torch.stack([alone[pack].sum() for pack in PACKS])
    assert ((packed - expected).abs() / expected).max() < TOLERANCE
    assert ((crossing - expected).abs() / expected).max() > 50 * TOLERANCE  # this test can fail


def test_windows_of_text_beside_packs_are_one_text_each() -> None:
    text = torch.arange(2 * WINDOW).int().view(2, WINDOW)
    both = everything(join_samples([Samples.of_windows(text), PACKED]))
    assert both["position_ids"][:2].tolist() == [list(range(WINDOW))] * 2
    assert both["position_ids"][2:].equal(everything(PACKED)["position_ids"])
    assert both["input_ids"][:2].equal(text.long())


def test_a_batch_by_length_has_the_same_samples_the_longest_first() -> None:
    lengths = SAMPLES.lengths()
    plain, sorted_ = SampleOrder(8, 4, 3), SampleOrder(8, 4, 3, lengths=lengths)
    for step in range(5):
        assert sorted(plain.batch(step).tolist()) == sorted(sorted_.batch(step).tolist())
        assert lengths[sorted_.batch(step)].tolist() == sorted(
            lengths[plain.batch(step)].tolist(), reverse=True
        )


# Several sources: their samples, their weights, and every way to get them wrong


def config_of(entries: Any, **settings: Any) -> DataConfig:
    return config_from_dict(
        {"output_dir": "out", "data": {"path": entries, "window": 8} | settings}
    ).data


def load(entries: Any, **settings: Any) -> LoadedData:
    return load_samples(
        config_of(entries, **settings), make_tokenizer(), minimum=1, vocab_size=100, starts=Starts()
    )


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_json(tmp_path / "text.jsonl", documents(20)))


@pytest.fixture
def instructions(tmp_path: Path) -> str:
    return str(write_json(tmp_path / "instructions.jsonl", INSTRUCTIONS))


def rows(data: LoadedData) -> list[list[int]]:
    return [
        data.samples.inputs(numbers(i))["input_ids"][0].tolist() for i in range(len(data.samples))
    ]


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
    assert both.samples.count_supervised(numbers(len(both.samples) - 1)) == 7
    assert len(load([second, second], window=64, max_samples=5).samples) == 10  # of each


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
def test_weights_are_fractions(
    counts: tuple[int, ...], weights: tuple[float, ...], times: tuple[int, ...]
) -> None:
    numbers = mix(counts, weights)
    assert numbers.bincount().tolist() == [
        n for count, n in zip(counts, times, strict=True) for _ in range(count)
    ]


def test_a_source_may_be_repeated_in_part(text: str, instructions: str) -> None:
    found = mix((3, 10), (0.4, 0.6)).bincount()
    assert found[:3].sum() == pytest.approx(10 / 0.6 * 0.4, abs=0.5)
    assert found[:3].max() - found[:3].min() <= 1
    entries = [
        {"path": text, "weight": 1},
        {"path": instructions, "format": "instruction", "weight": 2.0},
    ]
    assert load(entries, window=64).epoch_length == 9 + round(9 / 2)


def test_steps_see_the_samples_of_an_epoch() -> None:
    epoch = mix((2, 8), (1, 1))
    order = SampleOrder(len(epoch), 4, 7, epoch)
    assert (
        torch.cat([order.batch(step) for step in range(4)]).sort().values.equal(epoch.sort().values)
    )
    assert epoch[SampleOrder(len(epoch), 4, 7).batch(1)].equal(order.batch(1))


def test_an_entry_has_what_it_does_not_give_from_data() -> None:
    config = config_of(
        [{"path": "a", "format": "chat"}, {"path": "b", "split": "test"}],
        text_field="body",
        name="x",
    )
    first, second = config.sources
    assert (first.format, first.split, first.text_field, first.name) == (
        "chat",
        "train",
        "body",
        "x",
    )
    assert (second.format, second.split, second.section) == ("text", "test", "data.path[1]")
    run = RunConfig("out", data=config)
    assert config_from_dict(run.to_dict()) == run


def test_a_path_alone_in_a_list_has_the_format_of_data(instructions: str) -> None:
    """A source of another format is named, also where it is plain text."""
    paths = [instructions, "a/b.txt"]
    assert [source.format for source in config_of(paths, format="chat").sources] == ["chat"] * 2
    must_name("data.path[1].format", load, [instructions, "embedded"], format="instruction")
    must_name(f"data.path[0].text_field {instructions} 'text'", load, [instructions])


def test_a_held_out_file_of_text_stands_beside_instructions_that_are_packed(
    instructions: str, tmp_path: Path
) -> None:
    held_out = write_json(tmp_path / "held_out.jsonl", [{"text": "w1 w2 w3"}])
    entries = [{"path": instructions, "format": "instruction"}]
    assert load(entries, window=64, packing=True, held_out=str(held_out)).held_out == "w1 w2 w3"


def test_an_endless_epoch_is_refused(
    text: str, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LONGEST_EPOCH", 1000)
    entries = [
        {"path": text, "weight": 0.001},
        {"path": instructions, "format": "instruction", "weight": 2},
    ]
    must_name("data.path", load, entries, window=64)
    entries[0]["weight"] = 1
    assert load(entries, window=64).epoch_length < 1000


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], "data.path"),
        ([7], "data.path[0] 7"),
        (["a.txt"], "data.path[0].path a.txt"),
        (["embedded", ""], "data.path[1]"),
        (["embedded", __file__], "data.path[1].path .py .jsonl"),
        ([{"weight": 1}], "data.path[0].path"),
        ([{"path": "a"}, {"path": "b", "weight": 0}], "data.path[1].weight"),
        ([{"path": "a", "wieght": 1}], "data.path[0].wieght weight"),
        ([{"path": "a"}, {"path": "b", "weight": 1}], "data.path[1].weight data.path[0]"),
        ([{"path": "embedded", "format": "instruction"}], "data.path[0].format"),
    ],
)
def test_a_bad_entry_is_named(entries: list[Any], names: str) -> None:
    must_name(names, load, entries)


@pytest.mark.parametrize(
    "names", ["data.path[1] empty.txt", "data.path[1] empty.json", "data.path[1] empty.jsonl"]
)
def test_an_empty_file_is_named(names: str, tmp_path: Path) -> None:
    path = tmp_path / names.split()[1]
    path.write_text("\n")
    must_name(names, load, ["embedded", str(path)])
    must_name("number.json 0", load, [str(write_json(tmp_path / "number.json", [7]))])


def test_what_all_entries_lack_stands_beside_the_list(text: str, tmp_path: Path) -> None:
    """An entry's null means that it is not given."""
    path = str(write_json(tmp_path / "pairs.jsonl", [{"instruction": "w1", "response": "w2"}] * 20))
    entries = [{"path": text}, {"path": path, "format": "instruction", "input_field": None}]
    must_name("data.path[1].input_field data.input_field", load, entries, window=64)
    assert load(entries, window=64, input_field=None).epoch_length == 19


def test_a_source_without_samples_can_have_no_weight(text: str, tmp_path: Path) -> None:
    short = str(write_json(tmp_path / "short.jsonl", [{"text": "w1"}] * 2))
    entries = [{"path": text, "weight": 1}, {"path": short, "weight": 1}]
    must_name("data.path[1].path short.jsonl", load, entries, held_out_fraction=0.5)


def test_the_embedded_chats_are_those_that_were_read() -> None:
    source = config_of(["embedded-chats"], format="chat").sources[0]
    rows, settings = read_rows(source), read_json(CHATS_FILE.with_suffix(".settings.json"))
    assert (
        len(rows)
        == len({row["prompt"] for row in rows})
        == sum(part["shipped"] for part in settings["parts"])
    )
    assert all(row["prompt"].strip() and row["completion"].strip() for row in rows)
    asked = {
        prompt.messages[-1]["content"]
        for name in PROMPTS.values()
        for prompt in read_prompts(name).prompts
    }
    assert not asked & {row["prompt"] for row in rows}
