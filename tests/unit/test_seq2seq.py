"""Encoder-decoders: losses against the stock class, rows of sources with targets, and their evaluation."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from loraprune_ds.config import DataConfig
from loraprune_ds.evaluate.answers import write_answers
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.generate.writer import Writer
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.perplexity import measure_perplexity
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from loraprune_ds.pretrained.tokenizer import Starts, tokenize_pairs
from loraprune_ds.pretrained.windows import split_batches
from loraprune_ds.session.forward_watch import ForwardWatch
from loraprune_ds.session.live import base_shape
from loraprune_ds.session.preparing import linear_names
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import LoadedData
from tests.support.families import tiny_model
from tests.support.one_rank import rank_of
from tests.support.refusals import must_name
from tests.support.texts import EOS, make_tokenizer, write_json

START = 0
TOKENIZER = make_tokenizer(template="$A </s>")  # as a T5's
STARTS = Starts(target=START)
PAIRS = [{"source": f"w{i + 1} w{i + 2}", "target": f"w{i + 20}"} for i in range(10)]
SIZES = [7, 4, 3, 9, 11, 2]  # of source and target, in turn


def pairs() -> list[tuple[Tensor, Tensor]]:
    texts = torch.randint(3, 97, (sum(SIZES),), generator=torch.Generator().manual_seed(3)).split(
        SIZES
    )
    return list(zip(texts[::2], texts[1::2], strict=True))


def rows_of(pairs: list[tuple[Tensor, Tensor]], width: int) -> tuple[Tensor, Tensor]:
    """Returns ids and labels of source, start and target, padded on the right."""
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, wanted, (source, target) in zip(ids, labels, pairs, strict=True):
        text = torch.cat([source, torch.tensor([START]), target])
        row[: len(text)], wanted[len(source) + 1 : len(text)] = text, target
    return ids, labels


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_losses_are_the_stock_class_s_forward_and_gradient(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """t5 scales its hidden states and mt5 does not. Rows of other lengths must not be seen."""
    monkeypatch.setattr("loraprune_ds.model.logits.chunk_size", lambda *_, **__: 5)
    stock, model = (tiny_model(family, attn_implementation=attention) for _ in range(2))
    model = with_token_losses(model)
    model.lm_head.weight = nn.Parameter(stock.lm_head.weight.detach().clone(), requires_grad=False)
    stock.lm_head.weight = model.lm_head.weight
    expected = [stock(input_ids=x[None], labels=y[None]).loss * len(y) for x, y in pairs()]
    losses = model(**dict(zip(("input_ids", "labels"), rows_of(pairs(), 16), strict=True)))
    torch.testing.assert_close(losses.sum(1), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.stack(expected).sum().backward()
    losses.sum().backward()
    found: Any = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if name != "lm_head.weight":
            scale = parameter.grad.abs().max()  # type: ignore[union-attr]
            torch.testing.assert_close(
                found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * float(scale)
            )


def load(folder: Path, rows: list[Any], **settings: Any) -> LoadedData:
    path = write_json(folder / "pairs.jsonl", rows)
    config = DataConfig(**({"path": str(path), "window": 8, "format": "seq2seq"} | settings))
    return load_samples(config, TOKENIZER, minimum=1, vocab_size=100, starts=STARTS)


def first_row(data: LoadedData) -> list[tuple[int, int]]:
    """Returns the tokens of the first sample with their labels."""
    columns, end = data.samples.columns, data.samples.starts[1]
    return list(
        zip(columns["input_ids"][:end].tolist(), columns["labels"][:end].tolist(), strict=True)
    )


def row(source: str, target: str) -> list[tuple[int, int]]:
    """Returns what a sample must be: the source with EOS, the start, and the target with EOS, which alone is learnt."""
    before = [*TOKENIZER(source)["input_ids"], START]
    return [(i, IGNORE_INDEX) for i in before] + [(i, i) for i in TOKENIZER(target)["input_ids"]]


@torch.no_grad()
def loss_of(model: Any, source: list[int], target: list[int]) -> float:
    """Returns the sum of the stock class's losses."""
    return float(model(input_ids=torch.tensor([source]), labels=torch.tensor([target])).loss) * len(
        target
    )


def test_every_format_gives_source_start_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(tmp_path, PAIRS, held_out_fraction=0.2)
    assert first_row(data) == row("w1 w2", "w20")
    held_out = [json.loads(line) for line in data.held_out.split("\n\n")]
    assert len(data.samples) == 8
    assert [one for one in PAIRS if one in held_out] == held_out
    with_bos = make_tokenizer(template="<s> $A </s>")  # as CodeT5's. A chat template may add EOS
    answers = [
        answer for _, answer in tokenize_pairs([("w1", "w2"), ("w1", "w2 </s>")], with_bos, START)
    ]
    assert answers == [with_bos(text_target="w2")["input_ids"]] * 2
    renamed = [{"a": one["source"], "b": one["target"]} for one in PAIRS]
    fields: Any = {"source_field": "a", "target_field": "b"}
    other = load(tmp_path, renamed, held_out_fraction=0.2, **fields)
    assert (other.samples.digest(), other.held_out) == (data.samples.digest(), data.held_out)
    config = DataConfig(path=str(tmp_path / "pairs.jsonl"), window=8, format="seq2seq", **fields)
    # The prompt of a decoder ends without EOS.
    of_decoder = load_samples(config, TOKENIZER, minimum=1, vocab_size=100, starts=Starts())
    assert first_row(of_decoder) == [
        x for x in row("w1 w2", "w20") if x[0] != START and x != (EOS, IGNORE_INDEX)
    ]
    instructions = [{"instruction": one["source"], "response": one["target"]} for one in PAIRS]
    told = load(tmp_path, instructions, format="instruction", input_field=None, window=40)
    *prompt, before, start, answer, eos = first_row(told)
    assert [before, start, answer, eos] == row("", "w20")
    assert {label for _, label in prompt} == {IGNORE_INDEX}
    template = "{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}w9 {% endif %}{% endfor %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    turns = [
        {"role": role, "content": f"w{i + 1}"} for i, role in enumerate(("user", "assistant") * 2)
    ]
    chats = load(
        tmp_path, [{"messages": turns}] * 5, format="chat", held_out_fraction=0.3, window=20
    )
    assert first_row(chats) == row("w1 w2 w9 w3", "w4 w9")  # the last turn alone


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"source": "w1", "target": " "}, "row 2 target"),
        ({"source": "w1"}, "row 2 target"),
        ({"source": "", "target": "w1"}, "row 2 source"),
        ({"source": "w1", "target": 5}, "line 2 'target'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, bad: Any, names: str) -> None:
    must_name(f"{tmp_path / 'pairs.jsonl'} {names}", load, tmp_path, [PAIRS[0], bad, *PAIRS])


def test_a_source_beyond_the_window_is_left_out_and_named(tmp_path: Path) -> None:
    # with EOS and the start no place is left
    long = {"source": " ".join(["w1"] * 7), "target": "w2"}
    data = load(tmp_path, [*PAIRS[:3], long, *PAIRS[3:], long], held_out_fraction=0.2)
    assert (data.samples.left_out, data.samples.first_left_out) == (
        2,
        f"row 4 of {tmp_path / 'pairs.jsonl'}",
    )
    # from the cache
    again = load(tmp_path, [*PAIRS[:3], long, *PAIRS[3:], long], held_out_fraction=0.2)
    assert (again.samples.left_out, again.samples.first_left_out) == (
        2,
        data.samples.first_left_out,
    )


def test_plain_text_is_refused_with_what_to_do(tmp_path: Path) -> None:
    must_name("data.format seq2seq", load, tmp_path, [{"text": "w1"}], format="text")
    for text in ("w1 w2", '{"source": "w1"}', '{"source": "w1", "target": ""}', "[1]"):
        must_name(
            "line 2 source target", split_batches, f"\n{text}", TOKENIZER, 8, None, STARTS, 2, 100
        )


def test_perplexity_is_that_of_targets_after_their_sources() -> None:
    model: Any = tiny_model("t5")
    text = "\n".join(map(json.dumps, PAIRS))
    batches = split_batches(text, TOKENIZER, 8, 7, STARTS, 3, 100)
    losses = with_token_losses(tiny_model("t5").requires_grad_(False))
    found = measure_perplexity(
        lambda ids, labels: losses(input_ids=ids, labels=labels), batches, rank_of(1, 0)
    )
    ids = [
        (TOKENIZER(one["source"])["input_ids"], TOKENIZER(one["target"])["input_ids"])
        for one in PAIRS[:7]
    ]
    total = sum(loss_of(model, x, y) for x, y in ids)
    assert (found.tokens, found.windows) == (14, 7)
    assert found.perplexity == pytest.approx(math.exp(total / 14), rel=1e-5)


def test_answers_are_those_of_generate_and_compared_with_targets(tmp_path: Path) -> None:
    """And the dense model's perplexity of them is that of its class."""
    model, dense = tiny_model("t5"), tiny_model("t5", seed=1)
    sources = [one["source"] for one in PAIRS[:3]]
    write: Any = model.generate  # whose start is padding here
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": EOS}
    alone = [
        write(torch.tensor([TOKENIZER(x)["input_ids"]]), **how)[0, 1:].tolist() for x in sources
    ]
    texts: list[Any] = [TOKENIZER.decode(ids[:-1] if ids[-1] == EOS else ids) for ids in alone]
    rows = [
        {"source": x, "target": y}
        for x, y in zip(sources, [texts[0], "nothing", texts[2] + " w1"], strict=True)
    ]
    settings = read_prompts(str(write_json(tmp_path / "prompts.jsonl", rows)), max_new_tokens=5)
    prompts = encode_prompts(settings, TOKENIZER, ("MODEL", None, 100), "--answers")
    made, _ = write_answers(
        [Writer(x, TOKENIZER, prompts, START) for x in (model, dense)], settings
    )
    assert [one.text for one in made.greedy.texts] == texts
    assert made.greedy.exact_match == pytest.approx(1 / 3)
    assert made.greedy.rouge_l is not None
    assert 1 / 3 < made.greedy.rouge_l < 2 / 3
    total = sum(loss_of(dense, x, y) for x, y in zip(prompts, alone, strict=True))
    expected = math.exp(total / sum(map(len, alone)))
    assert made.greedy.dense_perplexity == pytest.approx(expected, rel=1e-5)
    missing = [*rows[:2], {"source": "w1"}]
    must_name(
        "--answers prompts.jsonl 2",
        read_prompts,
        str(write_json(tmp_path / "prompts.jsonl", missing)),
    )


@pytest.mark.parametrize(
    ("pad", "eos", "counted"),
    [(0, 2, 3), (0, [2, 3], 2), (0, None, 4), (None, 2, 5), (None, [2, 3], 4), (None, None, 6)],
)
def test_a_trainer_s_targets_count_without_padding_and_ends(
    pad: int | None, eos: int | list[int] | None, counted: int
) -> None:
    model: Any = tiny_model("umt5")
    model = get_peft_model(model, LoraConfig(target_modules=linear_names(model)))
    model.get_base_model().decoder.config.update({"pad_token_id": pad, "eos_token_id": eos})
    shape = base_shape(model)
    live = SimpleNamespace(
        module=model, device=torch.device("cpu"), shape=shape, layers=decoder_layers(model)
    )
    pruner: Any = SimpleNamespace(model=live, record_forward=lambda *masks: nullcontext())
    watch = ForwardWatch(pruner)
    watch.active = True
    targets = torch.tensor([[START, 9, 3, 2, 0, 0]])
    output = model.train()(input_ids=torch.tensor([[7, 8]]), decoder_input_ids=targets)
    assert watch.take_tokens() == 0  # of no backward pass
    output.logits.sum().backward()
    assert watch.take_tokens() == 2 + counted  # the source has no mask
    told = torch.tensor([[True] * 5 + [False]])
    with watch.know([None, told]):
        output = model(input_ids=torch.tensor([[7, 8]]), decoder_input_ids=targets)
    output.logits.sum().backward()
    assert watch.take_tokens() == 2 + 5
