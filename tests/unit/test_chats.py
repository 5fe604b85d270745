"""`launch/chats.py`: sampling against a plain computation, what is refused and why, and a command that was killed."""

import json
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from loraprune_ds.cli.chats import parse_arguments
from loraprune_ds.evaluate import chats, models
from loraprune_ds.evaluate.chats import FREE, Draw, Drawer, Selection, collect
from loraprune_ds.evaluate.models import Ids, Writer, find_model, leave_one, load_model, sample_by_vllm
from loraprune_ds.evaluate.settings import EvaluationText, read_prompts
from loraprune_ds.ranks.comm import Communicator
from tests.oracle.models import make_tiny_llama
from tests.refusals import must_name

BOS, END = 1, 2
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "
HOW: Any = GenerationConfig(max_new_tokens=11, temperature=0.8, top_p=0.9, do_sample=True, eos_token_id=[END])


def make_chat_model(folder: Path) -> Path:
    """Makes a random chat model, most of whose texts end by themselves."""
    make_tiny_llama(folder, vocab=259)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][END] *= 2.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    monkeypatch.setattr(chats, "ROUND", 8)
    given = {"max_new_tokens": 30, "seed": 0, "batch_size": 4, "engine": "transformers"}
    return Namespace(model=str(folder), out=tmp_path / "chats.jsonl", tokens=300, prompts=None, text=None, **given)


def changed(options: Namespace, **changes: Any) -> Namespace:
    return Namespace(**vars(options) | changes)


# Sampling


def test_numbers_that_cover_the_unit_interval_give_the_nucleus_in_its_proportions() -> None:
    scores = torch.tensor([2.0, -1.0, 1.0, 0.0, -9.0])
    count = 10_000
    numbers = (torch.arange(count) + 0.5)[:, None] / count
    how = GenerationConfig(temperature=0.5, top_p=0.9, do_sample=True)
    kept = leave_one(how, numbers, 3, torch.zeros(count, 3, dtype=torch.int64), scores.expand(count, -1))
    assert (kept > -math.inf).sum(1).eq(1).all()
    shares = kept.argmax(1).bincount(minlength=5) / count
    p = (scores.double() / 0.5).softmax(0)  # 0.86, 0.12 and less: the second passes 0.9
    expected = torch.stack([p[0], torch.tensor(0), p[2], torch.tensor(0), torch.tensor(0)]) / (p[0] + p[2])
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1 / count)  # a number may fall on either side


@torch.no_grad()
def by_hand(model: Any, prompt: Ids, seed: int) -> Ids:
    """Samples one text without a cache or a batch."""
    numbers, ids = torch.rand(99, generator=torch.Generator().manual_seed(seed)), list(prompt)
    while len(ids) < len(prompt) + HOW.max_new_tokens and (len(ids) == len(prompt) or ids[-1] != END):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        p, order = (logits / HOW.temperature).softmax(0).sort(descending=True)
        p = p[: int((p.cumsum(0) - p < HOW.top_p).sum())].cumsum(0)
        ids.append(int(order[int((p <= numbers[len(ids) - len(prompt)] * p[-1]).sum())]))
    return ids[len(prompt) :]


def test_a_text_follows_from_its_seed_in_any_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "CHUNK", 4)
    model: Any = load_model(find_model(str(folder)), "float32", torch.device("cpu"))
    writer = Writer(model, AutoTokenizer.from_pretrained(folder))
    prompts = [[BOS, *range(5, 5 + n)] for n in (3, 9, 1, 4, 20, 2, 2)]
    expected = [by_hand(model, prompt, seed) for seed, prompt in enumerate(prompts)]
    assert {len(ids) == HOW.max_new_tokens for ids in expected} == {True, False}
    for batch_size in (1, 3, 7):
        assert writer.sample(batch_size, prompts, range(7), HOW) == expected


def test_vllm_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def generate(prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        asked.extend(zip(prompts, settings, strict=True))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(7, END))]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=dict))
    assert sample_by_vllm(SimpleNamespace(generate=generate), [[1, 2], [3]], [8, 9], HOW) == [[7, END]] * 2
    common = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 11, "stop_token_ids": [END], "ignore_eos": True}
    expected = [({"prompt_token_ids": ids}, common | {"seed": seed}) for ids, seed in (([1, 2], 8), ([3], 9))]
    assert asked == expected


# Draws


def drawer_of(options: Namespace, *texts: str) -> tuple[Drawer, list[str]]:
    """Returns a drawer for a model that writes these texts in turn, and what the model will have read.

    A text ends with </s>, or is cut off.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    drawer, read = Drawer(options, find_model(options.model), tokenizer, Communicator()), list[str]()
    left = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def sample(prompts: Sequence[Ids], seeds: Sequence[int], how: GenerationConfig) -> list[Ids]:
        read.extend(map(str, map(tokenizer.decode, prompts)))
        return [left.pop(0) for _ in prompts]

    drawer.sample = sample
    return drawer, read


def test_a_message_continues_the_template_and_its_answer_reads_it(options: Namespace) -> None:
    drawer, read = drawer_of(options, *[" he do, then</s>"] * 4)
    plain, code = drawer.draw([0, 1])
    assert [plain.kind, code.kind] == ["chat", "code"]
    opening = read[1].removeprefix("<s>user: ")
    assert read[0] == "<s>user: "
    assert len(opening) > 5
    message = code.messages[0]["content"]
    assert message == f"{opening} he do, then"
    assert read[3] == f"<s>user: {message}</s><s>assistant: "
    assert (code.answer, code.answer_tokens, code.refused) == ("he do, then", 12, None)
    assert code.prompt_tokens == len(drawer.tokenizer(read[3], add_special_tokens=False)["input_ids"])


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
def test_a_draw_is_refused_for_a_reason(message: str, answer: str, refused: str | None, options: Namespace) -> None:
    (draw,) = drawer_of(options, message, *filter(None, [answer]))[0].draw([0])
    assert draw.refused == refused
    assert (draw.prompt_tokens > 0) == bool(answer)


def test_a_template_is_asked_not_to_think_and_must_mark_the_end_of_a_message(options: Namespace) -> None:
    drawer, read = drawer_of(options, "Why is it?</s>", "So.</s>")
    drawer.tokenizer.chat_template = TEMPLATE + "{% if enable_thinking is false %}<unk>{% endif %}"
    drawer.draw([0])
    assert read[1].endswith("assistant: <unk>")
    drawer.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    must_name(f"{options.model} --prompts", drawer.draw, [0])


def test_a_text_continues_a_line_and_may_stop_anywhere(options: Namespace) -> None:
    options.text = EvaluationText("text.txt", None, "The sun is warm here and there")
    (draw,) = drawer_of(options, "in spring")[0].draw([0])
    assert (draw.answer, draw.messages, draw.refused) == ("The sun is warm in spring", [], None)


# The selection


def refusals(options: Namespace, messages: Sequence[str], answer: str = "Yes.") -> list[str | None]:
    selection = Selection(options)
    for i, message in enumerate(messages):
        selection.add(Draw(i, "chat", [{"role": "user", "content": message}], answer, 5, 2))
    assert selection.tokens == 7 * len(selection.kept)
    return [draw.refused for draw in selection.draws]


def test_near_duplicates_common_openings_and_declining_answers_are_capped(options: Namespace) -> None:
    of_user = changed(options, prompts=read_prompts("default"))
    alike = ["What is the colour of snow?", "Of snow: what is the COLOUR", "What is the colour of milk?"]
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
    "messages", [("How are you?", "Who am I?", "You: how are"), ("😀 !!! ???", "!!! 😀", "😀 !!! ???")]
)
def test_messages_of_short_words_or_none_are_compared_whole(messages: tuple[str, ...], options: Namespace) -> None:
    assert refusals(options, messages) == [None, None, "message: near-duplicate"]


def test_a_message_without_words_takes_no_room_of_answers_that_decline(options: Namespace) -> None:
    messages = ["!!! ???", *(f"word{i} is what" for i in range(FREE))]
    assert refusals(options, messages, "I'm sorry.") == [None] * FREE + ["answer: declines"]


# The command


def run(options: Namespace) -> str:
    collect(options, Communicator())
    return options.out.read_text()


def test_a_killed_command_goes_on_where_it_was(
    options: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(changed(options, out=tmp_path / "whole.jsonl"))
    with monkeypatch.context() as patch:
        patch.setattr(chats.tqdm, "update", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(options)
    journal = tmp_path / "chats.draws.jsonl"
    assert len(journal.read_text().splitlines()) == 9
    with journal.open("a") as file:
        file.write('{"number": 9, "kin')
    assert not options.out.exists()
    assert run(options) == expected
    assert journal.read_bytes() == (tmp_path / "whole.draws.jsonl").read_bytes()
    rows = [json.loads(line) for line in expected.splitlines()]
    settings = json.loads((tmp_path / "chats.settings.json").read_text())
    assert (settings["rows"], settings["engine"]) == (len(rows), "transformers")
    assert settings["draws"] == len(rows) + sum(settings["refused"].values())
    assert all(row.keys() == {"prompt", "completion"} for row in rows)
    monkeypatch.setattr(chats, "load_model", None)  # a finished command needs no model
    assert run(options) == expected
    must_name("chats.draws.jsonl seed", run, changed(options, seed=1))
    journal.unlink()
    must_name("--out chats.jsonl", run, options)


def test_prompts_of_a_user_are_answered_once(options: Namespace, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["Why?", turns] * 6))
    of_user = changed(options, tokens=None, prompts=read_prompts(str(path), "--prompts", max_new_tokens=30))
    rows = [json.loads(line)["prompt"] for line in run(of_user).splitlines()]
    assert rows
    assert all(prompt in ("Why?", turns) for prompt in rows)
    _, *draws = map(json.loads, (tmp_path / "chats.draws.jsonl").read_text().splitlines())
    assert [draw["messages"] for draw in draws] == [[{"role": "user", "content": "Why?"}], turns] * 6
    path.write_text(json.dumps({"prompt": "x" * 600}))
    long = changed(of_user, prompts=read_prompts(str(path), "--prompts"), out=tmp_path / "b.jsonl")
    must_name("--prompts prompts.jsonl 1", run, long)


def test_a_model_without_a_template_writes_texts(options: Namespace, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, base := tmp_path / "base", ignore=lambda *_: ["chat_template.jinja"])
    of_base = changed(options, model=str(base), tokens=40)
    assert json.loads(run(of_base).splitlines()[0]).keys() == {"text"}
    text = EvaluationText("text.txt", None, "Once upon a time\n\nThere was")
    texts = [json.loads(row)["text"] for row in run(changed(of_base, text=text, out=tmp_path / "b.jsonl")).splitlines()]
    assert all(text.startswith(("Once upon a time", "There was")) for text in texts)
    assert len(texts) > 1
    must_name("--engine vllm", run, changed(of_base, engine="vllm"))
    must_name("base --prompts", run, changed(of_base, tokens=None, prompts=read_prompts("default")))


def test_draws_that_are_never_fit_end(options: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "HOPELESS", 20)
    must_name("unfinished", run, changed(options, max_new_tokens=1))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("--out a.txt --tokens 9", "--out a.txt .jsonl"),
        ("--out none/a.jsonl --tokens 9", "--out none"),
        ("--out a.jsonl --tokens 0", "--tokens 0"),
        ("--out a.jsonl --tokens 9 --text none.txt", "--text none.txt"),
        ("--out a.jsonl --prompts none.jsonl", "--prompts none.jsonl"),
    ],
)
def test_bad_arguments_are_named(given: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chats", "MODEL", *given.split()])
    must_name(names, parse_arguments)
