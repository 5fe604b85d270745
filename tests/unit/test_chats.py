"""`launch/chats.py`: sampling against a plain computation, what is refused and why, and a command that was killed."""

import json
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from transformers import AutoTokenizer

from loraprune_ds.chats import collect as chats
from loraprune_ds.chats import draws
from loraprune_ds.chats.collect import collect
from loraprune_ds.chats.draws import BATCHES, Draw, Drawer
from loraprune_ds.chats.selection import FREE, Selection
from loraprune_ds.cli.chats import parse_arguments
from loraprune_ds.errors import RunError
from loraprune_ds.generate import sampling
from loraprune_ds.generate.models import Ids, find_model, load_model
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.generate.sampling import Sampling, Text, Tick, extend, leave_one
from loraprune_ds.generate.writer import Writer
from loraprune_ds.ranks.comm import Communicator
from tests.support.chat_model import BOS, END, TEMPLATE, make_chat_model
from tests.support.refusals import must_name

HOW = Sampling(max_new_tokens=11, temperature=0.8, top_p=0.9, eos_token_id=[END])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> Namespace:
    given = {"max_new_tokens": 30, "seed": 0, "batch_size": 4, "engine": "transformers"}
    return Namespace(
        model=str(folder), out=tmp_path / "chats.jsonl", tokens=300, prompts=None, **given
    )


def changed(options: Namespace, **changes: Any) -> Namespace:
    return Namespace(**vars(options) | changes)


# Sampling


def test_tokens_of_the_nucleus_are_drawn_in_its_proportions() -> None:
    scores = torch.tensor([2.0, -1.0, 1.0, 0.0, -9.0])
    count = 10_000
    rows = scores.expand(count, -1)
    limits = torch.tensor([[0.5, 0.9]]).expand(count, -1)
    kept = leave_one(limits, [torch.Generator().manual_seed(0)] * count, rows)
    assert (kept > -math.inf).sum(1).eq(1).all()
    shares = kept.argmax(1).bincount(minlength=5) / count
    p = (scores.double() / 0.5).softmax(0)  # 0.86, 0.12 and less: the second passes 0.9
    expected = p.where(torch.tensor([1, 0, 1, 0, 0]) > 0, 0) / (p[0] + p[2])
    # three standard deviations of so many draws
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=3 * (0.12 * 0.88 / count) ** 0.5)
    assert shares[[1, 3, 4]].sum() == 0


@torch.no_grad()
def by_hand(model: Any, prompt: Ids, seed: int) -> Ids:
    """Samples one text without a cache or a batch."""
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    while len(ids) < len(prompt) + HOW.max_new_tokens and (
        len(ids) == len(prompt) or ids[-1] != END
    ):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        p, order = (logits / HOW.temperature).softmax(0).sort(descending=True)
        noise = torch.empty(len(p)).exponential_(generator=generator)
        size = int((p.cumsum(0) - p < HOW.top_p).sum())
        ids.append(int(order[int((p / noise)[:size].argmax())]))
    return ids[len(prompt) :]


def test_a_text_follows_from_its_seed_in_any_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CHUNK", 4)
    model: Any = load_model(find_model(str(folder)), "float32", torch.device("cpu"))
    writer = Writer(model, AutoTokenizer.from_pretrained(folder))
    prompts = [[BOS, *range(5, 5 + n)] for n in (3, 9, 1, 4, 20, 2, 2)]
    seeds = range(42, 49)  # of which three end in the first two rounds
    expected = [by_hand(model, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert {len(ids) == HOW.max_new_tokens for ids in expected} == {True, False}
    for batch_size in (1, 3, 7):
        texts = [Text(prompt, seed, HOW) for prompt, seed in zip(prompts, seeds, strict=True)]
        written = list[int]()
        while unfinished := [text for text in texts if not text.ended]:
            extend(writer, batch_size, unfinished, written.append)
        assert [text.ids for text in texts] == expected
        assert sum(written) == sum(map(len, expected))


# Draws


def drawer_of(options: Namespace, *texts: str) -> tuple[Drawer, list[str]]:
    """Returns a drawer for a model that writes these texts in turn, and what the model will have read.

    A text ends with </s>, or is cut off.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    drawer, read = (
        Drawer(options, find_model(options.model), tokenizer, Communicator()),
        list[str](),
    )
    left = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def extend(texts: Sequence[Text], tick: Tick) -> None:
        for text in texts:
            read.append(str(tokenizer.decode(text.prompt)))
            text.add(left.pop(0))
            text.ended = True

    drawer.extend = extend
    return drawer, read


def drawn(drawer: Drawer, *numbers: int) -> list[Draw]:
    """Makes draws whose messages and answers end at once."""
    return [*drawer.draw(numbers), *drawer.draw([])]


def test_a_message_continues_the_template_and_its_answer_reads_it(options: Namespace) -> None:
    drawer, read = drawer_of(options, *[" he do, then</s>"] * 4)
    plain, code = drawn(drawer, 0, 1)
    assert [plain.kind, code.kind] == ["chat", "code"]
    opening = read[1].removeprefix("<s>user: ")
    assert read[0] == "<s>user: "
    assert len(opening) > 5
    message = code.messages[0]["content"]
    assert message == f"{opening} he do, then"
    assert read[3] == f"<s>user: {message}</s><s>assistant: "
    assert (code.answer, code.answer_tokens, code.refused) == ("he do, then", 12, None)
    assert code.prompt_tokens == len(
        drawer.tokenizer(read[3], add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize(
    ("message", "answer", "refused"),
    [
        ("Why is it?</s>", "Because it is.</s>", None),
        ("Why is it", "", "message: unfinished"),
        ("Why so?</s>", "", "message: short"),
        ("</s>", "", "message: empty"),
        ("Why <s> is it?</s>", "", "message: special token"),
        ("Why is it?</s>", "Because it", "answer: unfinished"),
        ("Why is it?</s>", " \n</s>", "answer: empty"),
        ("Why is it?</s>", "A <unk> b c</s>", "answer: special token"),
        ("Why is it?</s>", "It is so. It is so. It is so.</s>", "answer: repetition"),
    ],
)
def test_a_draw_is_refused_for_a_reason(
    message: str, answer: str, refused: str | None, options: Namespace
) -> None:
    drawer, _ = drawer_of(options, message, *filter(None, [answer]))
    (draw,) = drawn(drawer, 0)
    assert draw.refused == refused
    assert (draw.prompt_tokens > 0) == bool(answer)


def test_a_template_is_asked_not_to_think_and_must_mark_the_end_of_a_message(
    options: Namespace,
) -> None:
    drawer, read = drawer_of(options, "Why is it?</s>", "So.</s>")
    drawer.tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %}<unk>{% endif %}"
    drawn(drawer, 0)
    assert read[1].endswith("assistant: <unk>")
    drawer, _ = drawer_of(options)
    drawer.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    must_name(f"{options.model} --prompts", drawer.draw, [0])


# The selection


def refusals(options: Namespace, messages: Sequence[str], answer: str = "Yes.") -> list[str | None]:
    selection = Selection(options)
    for i, message in enumerate(messages):
        selection.add(Draw(i, "chat", [{"role": "user", "content": message}], answer, 5, 2))
    assert selection.tokens == 7 * len(selection.kept)
    return [draw.refused for draw in selection.draws]


def test_near_duplicates_common_openings_and_declining_answers_are_capped(
    options: Namespace,
) -> None:
    of_user = changed(options, prompts=read_prompts("default"))
    alike = [
        "What is the colour of snow?",
        "Of snow: what is the COLOUR",
        "What is the colour of milk?",
    ]
    assert refusals(options, alike) == [None, "message: near-duplicate", None]
    assert refusals(of_user, alike) == [None] * 3
    begin_alike = [f"Can you provide word{i}?" for i in range(FREE + 2)]
    assert refusals(options, begin_alike) == [None] * FREE + ["message: common opening"] * 2
    assert refusals(of_user, begin_alike) == [None] * (FREE + 2)
    others = [f"word{i} is what" for i in range(FREE + 2)]
    for answer in ("I'm sorry, but I have no data.", "As an AI, I sleep.", "I can’t help."):
        assert refusals(options, others, answer) == [None] * FREE + ["answer: declines"] * 2
        assert refusals(of_user, others, answer)[-1] == "answer: declines"


@pytest.mark.parametrize(
    "messages",
    [("How are you?", "Who am I?", "You: how are"), ("😀 !!! ???", "!!! 😀", "😀 !!! ???")],
)
def test_messages_of_short_words_or_none_are_compared_whole(
    messages: tuple[str, ...], options: Namespace
) -> None:
    assert refusals(options, messages) == [None, None, "message: near-duplicate"]


def test_a_message_without_words_takes_no_room_of_answers_that_decline(options: Namespace) -> None:
    messages = ["!!! ???", *(f"word{i} is what" for i in range(FREE))]
    assert refusals(options, messages, "I'm sorry.") == [None] * FREE + ["answer: declines"]


# The command


def run(options: Namespace) -> str:
    collect(options, Communicator())
    return options.out.read_text()


def journal_of(options: Namespace) -> Path:
    return options.out.with_suffix(".draws.jsonl")


def by_number(lines: Sequence[str]) -> dict[int, str]:
    """Returns the lines of a journal by the numbers of their draws. Draws in work at its end may be in it or not."""
    return {json.loads(line)["number"]: line for line in lines}


def test_a_killed_command_goes_on_where_it_was(
    options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(changed(options, out=tmp_path / "whole.jsonl"))
    journal = journal_of(options)
    with monkeypatch.context() as patch:
        patch.setattr(
            chats, "_append", Mock(wraps=chats._append, side_effect=[DEFAULT, KeyboardInterrupt])
        )
        with pytest.raises(KeyboardInterrupt):
            run(options)
    numbers = by_number(journal.read_text().splitlines()[1:]).keys()
    assert numbers
    assert numbers != set(range(len(numbers)))  # some before them were in work
    with journal.open("a") as file:
        file.write('{"number": 9, "kin')
    assert not options.out.exists()
    assert run(options) == expected
    rows = [json.loads(line) for line in expected.splitlines()]
    settings = json.loads((tmp_path / "chats.settings.json").read_text())
    assert (settings["rows"], settings["engine"]) == (len(rows), "transformers")
    assert settings["draws"] == len(rows) + sum(settings["refused"].values())
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    first, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([first, *lines[::-2], ""]))  # in any order
    assert run(options) == expected
    before, again = by_number(lines), by_number(journal.read_text().splitlines()[1:])
    assert before.keys() & again.keys() > by_number(lines[::-2]).keys()
    assert all(again[number] == before[number] for number in before.keys() & again.keys())
    monkeypatch.setattr(draws, "load_model", None)  # a finished command needs no model
    assert run(options) == expected
    must_name("chats.draws.jsonl seed", run, changed(options, seed=1))
    journal.unlink()
    must_name("--out chats.jsonl", run, options)


def test_a_command_stops_at_the_row_that_completes_its_tokens(options: Namespace) -> None:
    selection = collect(options, Communicator())
    last = selection.kept[-1]
    assert last == selection.draws[-1]
    assert (
        selection.tokens - last.prompt_tokens - last.answer_tokens
        < options.tokens
        <= selection.tokens
    )
    _, *lines = journal_of(options).read_text().splitlines()
    assert len(lines) < len(selection.draws) + BATCHES * options.batch_size


def test_each_token_is_a_sign_of_life(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(chats.tqdm, "set_postfix_str", lambda _, text, refresh: shown.append(text))
    run(changed(options, tokens=1))
    begun = [
        text for text in shown if text.endswith(" tokens written, 4 in work, 0 of 0 draws kept")
    ]
    assert begun[0].startswith("4 ")
    assert len(set(begun)) > 10


def test_a_damaged_line_of_the_journal_is_named(options: Namespace) -> None:
    run(changed(options, tokens=1))
    journal = journal_of(options)
    first, *lines = journal.read_bytes().splitlines(keepends=True)
    damages: list[tuple[int, list[bytes]]] = [
        (1, []),
        (1, [first[:-9]]),
        (1, [b"[1]\n", *lines]),
        (1, [b"".join([first, *lines]).decode().encode("utf-16")]),
        (2, [first, "{é}\n".encode("latin-1"), *lines]),
        (3, [first, lines[0], lines[1][:30] + b"\n", *lines[2:]]),
        (3, [first, lines[0], b'{"prompt": "a", "completion": "b"}\n', *lines]),
        (3, [first, lines[0], lines[1].replace(b'"messages": [', b'"messages": ["a", '), *lines]),
    ]
    for line, content in damages:
        journal.write_bytes(b"".join(content))
        must_name(f"{journal} line {line} --out", run, options)


@pytest.mark.parametrize("name", ["chats.draws.jsonl", "chats.jsonl"])
def test_a_full_disk_names_the_file(
    name: str, options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Path.open

    def full(path: Path, mode: str = "r", *given: Any, **settings: Any) -> Any:
        if name in path.name and mode in ("a", "w"):
            raise OSError(28, "No space left on device")
        return usual(path, mode, *given, **settings)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=rf"/{name} .*No space left on device.*again"):
        run(changed(options, tokens=1))


def test_prompts_of_a_user_are_answered_once(options: Namespace, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["Why?", turns] * 6)
    )
    of_user = changed(
        options, tokens=None, prompts=read_prompts(str(path), "--prompts", max_new_tokens=30)
    )
    rows = [json.loads(line)["prompt"] for line in run(of_user).splitlines()]
    assert rows
    assert all(prompt in ("Why?", turns) for prompt in rows)
    _, *made = map(json.loads, journal_of(of_user).read_text().splitlines())
    made.sort(key=lambda draw: draw["number"])
    assert [draw["messages"] for draw in made] == [[{"role": "user", "content": "Why?"}], turns] * 6
    path.write_text(json.dumps({"prompt": "x" * 600}))
    long = changed(of_user, prompts=read_prompts(str(path), "--prompts"), out=tmp_path / "b.jsonl")
    must_name("--prompts prompts.jsonl 1", run, long)


def test_a_model_without_a_template_or_vllm_is_named(
    options: Namespace, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, base := tmp_path / "base", ignore=lambda *_: ["chat_template.jinja"])
    of_base = changed(options, model=str(base))
    must_name(f"{base} template", run, of_base)
    # which would else be answered as plain texts
    of_user = changed(of_base, tokens=None, prompts=read_prompts("default"))
    must_name(f"{base} template", run, of_user)
    must_name("--engine vllm", run, changed(options, engine="vllm"))


def test_draws_that_are_never_fit_end(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "HOPELESS", 20)
    must_name("unfinished", run, changed(options, max_new_tokens=1))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("--out a.txt --tokens 9", "--out a.txt .jsonl"),
        ("--out none/a.jsonl --tokens 9", "--out none"),
        ("--out a.jsonl --tokens 0", "--tokens 0"),
        ("--out a.jsonl --tokens 9 --text none.txt", "--text removed"),
        ("--out a.jsonl --prompts none.jsonl", "--prompts none.jsonl"),
    ],
)
def test_bad_arguments_are_named(
    given: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chats", "MODEL", *given.split()])
    must_name(names, parse_arguments)
