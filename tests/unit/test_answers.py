"""`launch/evaluate.py --answers`: prompts, texts, their measures against plain computations, the page and the card."""

import json
import math
import re
from dataclasses import asdict
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from launch.quickstart_answers import shown_lines
from loraprune_ds.evaluate import answers
from loraprune_ds.evaluate.answers import Answer, measure_closeness, write_answers
from loraprune_ds.evaluate.evaluation import prepare_models
from loraprune_ds.evaluate.result import answers_page
from loraprune_ds.evaluate.settings import EvaluationSettings, EvaluationText
from loraprune_ds.export.model_card import answers_section
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.prompts import AnswerSettings, Prompt, read_prompts
from loraprune_ds.generate.repetition import repetition
from loraprune_ds.generate.writer import Writer
from loraprune_ds.model.logits import output_head
from loraprune_ds.model.token_loss import IGNORE_INDEX
from tests.oracle.models import make_tiny_llama, make_tokenizer
from tests.support.evaluations import EVALUATION
from tests.support.refusals import must_name

SIZES: dict[str, Any] = {
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "hidden": 16,
    "ffn": 16,
    "layers": 2,
    "vocab": 100,
}
NEW, END = 12, 2
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
EVIL = "</pre><script>alert('&amp;')</script>\n# heading\n```\n<b>bold</b>"


def written(folder: Path, *rows: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_tiny_llama(root / str(seed), seed=seed, **SIZES) for seed in (1, 2)]


@pytest.fixture
def settings(tmp_path: Path) -> AnswerSettings:
    texts = ("a", "Which colour?", "2 + 3", "x" * 30, "the end", "1, 2, 3")
    rows = [{"prompt": text, "kind": "odd" if i % 2 else "even"} for i, text in enumerate(texts)]
    return read_prompts(written(tmp_path, *rows), max_new_tokens=NEW)


def load(folder: Path, settings: AnswerSettings, template: str | None = None) -> Writer:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Writer(
        model, tokenizer, encode_prompts(settings, tokenizer, ("MODEL", 512, 100), "--answers")
    )


# Prompts


def test_a_row_is_a_text_or_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    found = read_prompts(
        written(tmp_path, {"prompt": "ä", "expected": "b", "id": 7}, "", {"prompt": messages})
    )
    first = Prompt(1, [{"role": "user", "content": "ä"}], expected="b")
    assert (found.name, found.prompts) == ("prompts.jsonl", (first, Prompt(3, messages)))


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("{prompt", "JSON"),
        ('["prompt"]', "prompt"),
        ({"question": "a"}, "prompt"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "user"),
        ({"prompt": "a", "expected": 5}, "expected 5"),
        ({"prompt": "\ud800"}, "JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, names: str) -> None:
    path = written(tmp_path, {"prompt": "good"}, row)
    must_name(f"--answers {path} 2 {names}", read_prompts, path)


def test_a_file_without_prompts_and_a_prompt_without_room_are_refused(
    tmp_path: Path, folders: list[Path]
) -> None:
    must_name(path := written(tmp_path), read_prompts, path)
    must_name("--answers gone.jsonl", read_prompts, "gone.jsonl")
    path = written(tmp_path, {"prompt": "a"}, {"prompt": "b" * 501})
    must_name(
        "prompts.jsonl 2 MODEL 512 501 12", load, folders[0], read_prompts(path, max_new_tokens=12)
    )
    prompts, tokenizer = (
        read_prompts(written(tmp_path, {"prompt": "a"}, {"prompt": "é"})),
        make_tokenizer(259),
    )
    must_name(
        "prompts.jsonl 2 vocab_size 100",
        encode_prompts,
        prompts,
        tokenizer,
        ("MODEL", None, 100),
        "--answers",
    )


def test_a_limit_of_windows_is_none_of_prompts(
    settings: AnswerSettings, folders: list[Path]
) -> None:
    asked = EvaluationSettings(
        8, 1, text=EvaluationText("a", None, "the end " * 9), answers=settings
    )
    (found,) = prepare_models([str(folders[0])], asked)
    assert (len(found.batches), len(found.prompts)) == (1, 6)


def test_the_models_template_is_used_and_may_refuse(tmp_path: Path, folders: list[Path]) -> None:
    settings = read_prompts(written(tmp_path, {"prompt": "Why?"}))
    writer = load(folders[0], settings, TEMPLATE)
    assert writer.tokenizer.decode(writer.prompts[0]) == "<user>Why?<answer>"
    must_name(
        "prompts.jsonl 1 MODEL no user",
        load,
        folders[0],
        settings,
        "{{ raise_exception('no\nuser') }}",
    )


# Texts


def test_repetition_is_the_share_of_four_grams_that_occurred_before() -> None:
    assert [
        repetition(ids) for ids in ([], [1, 2, 3], [1, 2, 3, 4], [1] * 7, [1, 2, 3, 4] * 2)
    ] == [0, 0, 0, 0.75, 0.2]


def by_hand(writer: Writer, prompt: list[int]) -> list[int]:
    """Writes greedily, one prompt and one token at a time, without a cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] != END):
        ids.append(int(writer.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_texts_and_measures_equal_a_plain_computation(
    settings: AnswerSettings, folders: list[Path]
) -> None:
    writers = [load(folder, settings) for folder in folders]
    with torch.no_grad():  # so that most answers end, and one is empty
        for writer in writers:
            output_head(writer.model).weight[END] *= 3
    expected = [by_hand(writers[0], prompt) for prompt in writers[0].prompts]
    # A model's own settings would hide that it repeats itself.
    writers[0].model.generation_config = GenerationConfig(
        repetition_penalty=9.0, eos_token_id=END, do_sample=True
    )
    first, dense = write_answers(writers, settings, batch_size=4)
    words = [ids[:-1] if ids[-1] == END else ids for ids in expected]
    assert [one.text for one in first.greedy.texts] == [
        writers[0].tokenizer.decode(ids) for ids in words
    ]
    assert [(one.tokens, one.ended, one.repetition) for one in first.greedy.texts] == [
        (len(ids), 0 < len(ids) < len(all_ids), repetition(ids))
        for ids, all_ids in zip(words, expected, strict=True)
    ]
    assert 0 < first.greedy.ended == sum(one.ended for one in first.greedy.texts) / 6 < 1
    losses = []
    for prompt, ids in zip(writers[1].prompts, expected, strict=True):
        logits = (
            writers[1]
            .model(input_ids=torch.tensor([prompt + ids]))
            .logits[0]
            .double()
            .log_softmax(-1)
        )
        losses.append([-float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(ids)])
    assert list(first.greedy.by_kind) == ["even", "odd"]
    for part, rows in zip(
        (first.greedy, *first.greedy.by_kind.values()), ("012345", "024", "135"), strict=True
    ):
        chosen = [int(row) for row in rows]
        of_tokens = [loss for i in chosen for loss in losses[i]]
        assert part.dense_perplexity == pytest.approx(
            math.exp(math.fsum(of_tokens) / len(of_tokens)), rel=1e-5
        )
        assert part.empty == sum(not words[i] for i in chosen) / len(chosen)
        assert part.ended == sum(0 < len(words[i]) < len(expected[i]) for i in chosen) / len(chosen)
    assert first.greedy.empty > 0
    assert (first.greedy.dense_perplexity or 0) > (dense.greedy.dense_perplexity or math.inf)
    assert (first.chat_template, dense.closeness) == (False, None)
    assert first.closeness is not None
    assert first.closeness.text == "the dense model's greedy answers"
    lengths = [min(one.tokens + 1, NEW) for one in dense.greedy.texts]  # with the end token
    assert first.closeness.predictions == sum(lengths)


def test_sampling_follows_from_the_seed_and_needs_no_dense_model(
    settings: AnswerSettings, folders: list[Path]
) -> None:
    (first,), (second,) = (write_answers([load(folders[0], settings)], settings) for _ in range(2))
    assert first == second
    assert first.sampled.texts != first.greedy.texts
    assert first.sampled.dense_perplexity is None


@torch.no_grad()
def test_speed_is_that_of_equally_many_tokens_written_by_turns(
    settings: AnswerSettings, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock goes on by one at each token of the dense model, and by a half at one of the other."""
    writers = [load(folder, settings) for folder in folders]
    turns: list[int] = []
    for i, writer in enumerate(writers):
        output_head(writer.model).weight[END] *= 3  # most answers end at once
        writer.model.register_forward_hook(lambda *_, i=i: turns.append(i))
    monkeypatch.setattr(answers, "TIMED_AT_ONCE", 4)
    monkeypatch.setattr(answers, "perf_counter", lambda: sum((1 + i) / 2 for i in turns))
    assert answers.measure_speed(writers, settings) == [6 / (2 * 0.5), 6 / (2 * 1.0)]
    assert turns == ([0] * NEW + [1] * NEW) * 2


def test_the_quickstart_shows_the_first_prompt_of_each_kind_and_counts_all(
    settings: AnswerSettings,
) -> None:
    def answers_of(name: str, ended: float, tokens: int) -> dict[str, Any]:
        means = {"tokens": 9.0, "ended": ended, "repetition": 0.0, "empty": 0.0}
        texts = [asdict(Answer(f"{name} {i}", tokens, False, 0.0, False)) for i in range(6)]
        kinds = {"even": means, "odd": means}
        return {"answers": {"greedy": means | {"by_kind": kinds, "texts": texts}}}

    result = answers_of("pruned", 0.5, NEW) | {
        "dense": answers_of("dense", 1.0, NEW - 1),
        "answers_plan": asdict(settings),
    }
    words = [line.split() for line in "\n".join(shown_lines(result)).splitlines() if line]
    assert words[1:5] == [
        [">", "even:", "a"],
        ["dense", "0", "pruned", "0", "..."],  # at the limit
        [">", "odd:", "Which", "colour?"],
        ["dense", "1", "pruned", "1", "..."],
    ]
    assert [row[0] for row in words[7:]] == ["all", "even", "odd"]
    assert words[7][1:6] == ["100.0", "%", "->", "50.0", "%"]


def test_an_answer_of_spaces_or_special_tokens_is_empty(
    settings: AnswerSettings, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = load(folders[0], settings)
    space, letter = (
        writer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" ", "a")
    )
    special = next(i for i in writer.tokenizer.all_special_ids if i not in writer.ends)
    texts = [space, [special], letter, [special, *letter], [], letter]
    monkeypatch.setattr(Writer, "write", lambda *given, **how: [[*ids, END] for ids in texts])
    (made,) = write_answers([writer], settings)
    assert [one.empty for one in made.greedy.texts] == [True, True, False, False, True, False]
    assert [one.ended for one in made.greedy.texts] == [not one.empty for one in made.greedy.texts]


@torch.no_grad()
def test_a_diverged_model_has_answers_that_are_worth_nothing(
    settings: AnswerSettings, folders: list[Path]
) -> None:
    writers = [load(folder, settings) for folder in folders]
    output_head(writers[0].model).weight.fill_(math.nan)
    first, _ = write_answers(writers, settings)
    assert len(first.sampled.texts) == 6
    assert first.closeness is not None
    assert math.isnan(first.closeness.kl)


@torch.no_grad()
def test_closeness_is_as_computed_plainly_and_a_model_is_itself(
    settings: AnswerSettings, folders: list[Path]
) -> None:
    pruned, dense = (load(folder, settings).model for folder in folders)
    ids = torch.randint(3, 100, (3, 10), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[2, :6] = IGNORE_INDEX
    found = measure_closeness(
        dense, pruned, [(ids[:2], labels[:2]), (ids[2:], labels[2:])], "a text"
    )
    p, q = (
        torch.cat([every[:2].flatten(0, 1), every[2, 5:]])
        for every in (
            model(input_ids=ids).logits.double().softmax(-1)[:, :-1] for model in (dense, pruned)
        )
    )
    assert found.predictions == len(p) == 22
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.overlap == pytest.approx(p.minimum(q).sum(-1).mean().item(), rel=1e-5)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    same = measure_closeness(dense, dense, [(ids, ids)], "a text")
    assert (same.agreement, same.overlap, same.kl) == (1.0, pytest.approx(1.0), 0.0)


# The page, the card and the comparison


def answered(prompts: int, text: str = EVIL) -> dict[str, Any]:
    """Returns an evaluation whose texts are numbered."""
    rows = [
        {"row": i, "messages": [{"role": "user", "content": f"q{i} {text}"}]}
        for i in range(prompts)
    ]

    def model(name: str) -> dict[str, Any]:
        one = {"tokens": 9.0, "ended": 0.5, "repetition": 0.25, "dense_perplexity": 3.0}
        one |= {"empty": 0.0, "by_kind": {}}
        texts = [one | {"text": f"{name}{i} {text}"} for i in range(prompts)]
        close = {"text": "t", "agreement": 0.75, "overlap": 0.5, "kl": 1.5, "predictions": 9}
        closeness = close if name == "pruned" else None
        kinds = dict.fromkeys(("greedy", "sampled"), one | {"texts": texts})
        return {
            "path": f"{name}/<path>",
            "answers": {"chat_template": False, "closeness": closeness, **kinds},
        }

    plan = asdict(AnswerSettings("my.jsonl", "0", ()))
    plan["prompts"] = [
        row | {"kind": "<i>chat</i>", "expected": text, "target": None} for row in rows
    ]
    return {
        **EVALUATION,
        **model("pruned"),
        "dense": EVALUATION["dense"] | model("dense"),
        "answers_plan": plan,
    }


def texts_of(page: str) -> list[str]:
    """Returns the text of every <pre>."""
    return [unescape(text) for text in re.findall("<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]


def test_the_page_escapes_every_text_and_has_both_models_side_by_side() -> None:
    html = answers_page(answered(3))
    texts = texts_of(html)
    assert not {"script", "b", "i", "path"} & set(re.findall(r"<(\w+)", html))
    assert "no chat template, so plain text" in html
    assert '<meta name="viewport" content="width=device-width' in html
    assert texts[0].split()[:6] == "greedy answers, dense -> pruned answers".split()
    found = [text.split()[0] for text in texts[1:] if text.strip()]
    assert found == [name for i in range(3) for name in (f"q{i}", *(f"dense{i}", f"pruned{i}") * 2)]
    assert all(EVIL in text for text in texts[1:])
    assert len(texts_of(answers_page(answered(1) | {"dense": None}))) == 4


@pytest.mark.parametrize(
    ("prompts", "shown"), [(50, [0, 10, 20, 30, 40]), (7, [0, 1, 2, 4, 5]), (3, [0, 1, 2])]
)
def test_the_card_shows_five_answers_that_cannot_leave_their_block(
    prompts: int, shown: list[int]
) -> None:
    lines = answers_section(answered(prompts)).splitlines()
    indented = [line[4:] for line in lines if line.startswith("    ")]
    others = {line for line in lines if not line.startswith("    ")}
    assert others == {
        "## Answers",
        "Greedy, at most 128 tokens.",
        "",
        "Prompt:",
        "Dense:",
        "Pruned:",
    }
    expected = [f"{name}{i}" for i in shown for name in ("q", "dense", "pruned")]
    assert [line.split()[0] for line in indented if line[:1] in "qdp"] == expected
