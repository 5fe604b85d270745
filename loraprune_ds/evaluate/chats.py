"""Chats that a model writes itself, to tune its pruned copy on.

As in Magpie (Xu et al., arXiv 2406.08464), a model that reads its template up to the user's turn writes the user's
message, then its answer. A model left alone writes little code, extraction or arithmetic, so half of the messages begin
with an opening of such a kind. A model without a template writes plain texts.
"""

import importlib
import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraprune_ds.errors import require
from loraprune_ds.evaluate.answers import encode_prompts, repetition
from loraprune_ds.evaluate.evaluation import choose_dtype
from loraprune_ds.evaluate.models import Ids, ModelSource, Writer, end_ids, find_model, load_model, sample_by_vllm
from loraprune_ds.evaluate.settings import AnswerSettings, Message, Prompt
from loraprune_ds.files import json_text, read_json, write_json, write_text
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.model.tokenizer import load_tokenizer, rendering, token_ids
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import fast_half_products
from loraprune_ds.units import aligned, format_percent

DATA = read_json(Path(__file__).with_name("chats.json"))
KINDS, OPENINGS = DATA["kinds"], DATA["openings"]  # the kinds of the draws, in turn
DECLINES = re.compile(rf"\b({'|'.join(DATA['declines'])})", re.IGNORECASE)
MESSAGE = {"max_new_tokens": 96, "temperature": 0.8, "top_p": 0.95}  # the sampling of messages
ANSWER = {"temperature": 0.7, "top_p": 0.95}  # of answers and texts
PREFIX = 16  # tokens of a line that a plain text continues
FEWEST_WORDS, MOST_REPETITION = 3, 0.2
ALIKE, DECLINED = 0.03, 0.05  # most of the kept rows that begin with the same three words, and that decline
FREE = 5  # rows of either that are kept before the shares count
ROUND = 256  # draws of a rank between two writes to the journal
HOPELESS = 1000  # draws of which one must be kept
EXAMPLES = 10
MARK = "\u2042USER\u2042"


@dataclass(frozen=True)
class Draw:
    """A conversation and its answer, or a text without a conversation. `refused` says what is wrong with it."""

    number: int
    kind: str | None
    messages: list[Message]
    answer: str = ""
    prompt_tokens: int = 0  # with the template
    answer_tokens: int = 0  # without the end
    repetition: float = 0.0
    refused: str | None = None

    @property
    def row(self) -> dict[str, Any]:
        """The row of `data.format` chat or text."""
        prompt = self.messages if len(self.messages) != 1 else self.messages[0]["content"]
        return {"prompt": prompt, "completion": self.answer} if prompt else {"text": self.answer}


@dataclass
class Drawer:
    """Makes draws. A draw follows from the seed and its number, apart from rounding in other batches."""

    options: Namespace  # of cli/chats.py
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    ranks: Communicator

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the draws. Raises UserError if the model cannot make them."""
        options, folder, shape = self.options, self.source.pretrained.folder, self.source.pretrained.shape
        require(not shape.family.has_encoder, f"{options.model} has an encoder, which writes no chats")
        templated = bool(self.tokenizer.chat_template)
        if options.prompts:  # a row that does not fit is named before the first is answered
            require(templated, f"{options.model} has no chat template, which --prompts needs")
            self._encode(options.prompts, "--prompts")
        stock = not (self.source.adapter or shape.model_type.startswith(PRUNED))
        fits = find_spec("vllm") is not None and stock and self.ranks.world_size == 1
        require(fits or options.engine != "vllm", "--engine vllm needs that package, a stock model and one process")
        return {
            "model": options.model,
            "seed": options.seed,
            "engine": options.engine or ("vllm" if fits else "transformers"),
            "max_new_tokens": options.max_new_tokens,
            **ANSWER,
            "message": MESSAGE,
            "prompts": options.prompts and options.prompts.sha256,
            "text": options.text and options.text.sha256,
            "chats": templated and not options.text,
            "revision": folder.name if folder.parent.name == "snapshots" else None,  # in the hub's cache
            "dtype": choose_dtype(self.source, None),
        }

    @cached_property
    def sample(self) -> Callable[[Sequence[Ids], Sequence[int], GenerationConfig], list[Ids]]:
        """Samples a text after each prompt from its seed, with the id that ended it. Loads the model first."""
        folder, dtype = self.source.pretrained.folder, self.settings["dtype"]
        if self.settings["engine"] == "vllm":
            return partial(sample_by_vllm, importlib.import_module("vllm").LLM(str(folder), dtype=dtype))
        model = load_model(self.source, dtype, self.ranks.device)
        return partial(Writer(model, self.tokenizer).sample, self.options.batch_size)

    def draw(self, numbers: Sequence[int]) -> list[Draw]:
        """Makes the draws with these numbers. The user's prompts have one each."""
        given, how = self.options.prompts, {"max_new_tokens": self.options.max_new_tokens, **ANSWER}
        if not self.settings["chats"]:
            return self._continue([Draw(i, "text", []) for i in numbers], self._prefixes(numbers), how, "text")
        chosen = enumerate(given.prompts) if given else ()
        draws = [Draw(i, one.kind, one.messages) for i, one in chosen if i in numbers] if given else self._ask(numbers)
        asked = [draw for draw in draws if not draw.refused]
        prompts = tuple(Prompt(draw.number, draw.messages) for draw in asked)
        begun = self._encode(AnswerSettings("draws", "", prompts, self.options.max_new_tokens), "chats")
        return self._continue(asked, begun, how, "answer") + [draw for draw in draws if draw.refused]

    def _ask(self, numbers: Sequence[int]) -> list[Draw]:
        """Draws the user's messages, between the ids before them in the template and the special token after them."""
        path, chat = self.options.model, [{"role": "user", "content": MARK}]
        with rendering("chats", path, chat):
            text = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        before, after = token_ids(list(text.partition(MARK)[::2]), self.tokenizer, special=False)
        no_end = f"the chat template of {path} ends no message with a special token; give --prompts FILE"
        require(bool(self._special & {*after[:1]}), no_end)
        kinds = [KINDS[number % len(KINDS)] for number in numbers]
        opened = [Draw(i, kind, [], self._choose(OPENINGS[kind], i)) for i, kind in zip(numbers, kinds, strict=True)]
        openings = token_ids([draw.answer for draw in opened], self.tokenizer, special=False)
        draws = self._continue(opened, [before + ids for ids in openings], MESSAGE, "message", after[0])
        return [Draw(d.number, d.kind, [{"role": "user", "content": d.answer}], refused=d.refused) for d in draws]

    def _encode(self, settings: AnswerSettings, option: str) -> list[Ids]:
        """Returns the ids of prompts, without thinking where the template has that."""
        config, vocab_size = self.source.pretrained.config, self.source.pretrained.shape.vocab_size
        limits = self.options.model, config.get("max_position_embeddings"), vocab_size
        return encode_prompts(settings, self.tokenizer, limits, option, enable_thinking=False)

    def _prefixes(self, numbers: Sequence[int]) -> list[Ids]:
        """Returns the first ids of lines of the user's text, or BOS or EOS without a text."""
        text, start = self.options.text, self.tokenizer.bos_token or self.tokenizer.eos_token or ""
        lines = [line for line in text.text.splitlines() if line.strip()] if text else [str(start)]
        chosen = [self._choose(lines, number) for number in numbers]
        begun = [ids[:PREFIX] for ids in token_ids(chosen, self.tokenizer, special=bool(text))]
        require(all(begun), f"the tokenizer of {self.options.model} has no token that begins a text; give --text FILE")
        return begun

    def _continue(self, draws: list[Draw], begun: list[Ids], how: dict[str, Any], turn: str, *end: int) -> list[Draw]:
        """Adds the text that follows the ids in `begun` to each draw's answer, and says what is wrong with it."""
        ends, made = [*self._ends, *end], list[Draw]()
        seeds = [self._hash(draw.number, turn) for draw in draws]
        written = self.sample(begun, seeds, GenerationConfig(**how, do_sample=True, eos_token_id=ends))
        for draw, before, ids in zip(draws, begun, written, strict=True):
            ended = ids[-1] in ends
            words = ids[:-1] if ended else ids
            before, whole = ([], before + words) if turn == "text" else (before, words)
            text = draw.answer + str(self.tokenizer.decode(whole, skip_special_tokens=True))
            faults = {
                "special token": bool(self._special & {*words}),
                "unfinished": not ended and turn != "text",  # which may stop anywhere
                "empty": not str(self.tokenizer.decode(words)).strip(),
                "repetition": repetition(words) > MOST_REPETITION,
                "short": turn == "message" and len(text.split()) < FEWEST_WORDS,
            }
            fault = next((f"{turn}: {fault}" for fault, found in faults.items() if found), None)
            measures = len(before), len(whole), repetition(whole)
            made.append(Draw(draw.number, draw.kind, draw.messages, text.strip(), *measures, fault))
        return made

    @cached_property
    def _ends(self) -> set[int]:
        """The ids that end a text, named by the model's settings or by its tokenizer."""
        own, config = self.source.pretrained.folder / "generation_config.json", self.source.pretrained.config
        return end_ids((read_json(own) if own.is_file() else config).get("eos_token_id"), self.tokenizer)

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def _choose(self, texts: Sequence[str], number: int) -> str:
        return texts[self._hash(number, "opening") % len(texts)]

    def _hash(self, number: int, name: str) -> int:
        """Returns a seed of 32 bits. A CPU's generator ignores more."""
        return int.from_bytes(sha256(f"{self.options.seed}/{number}/{name}".encode()).digest()[:4], "big")


@dataclass
class Selection:
    """Draws in their order, and which of them are kept: no near-duplicates, and few that decline or begin alike."""

    options: Namespace  # of cli/chats.py
    draws: list[Draw] = field(default_factory=list)
    kept: list[Draw] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # the reasons
    tokens: int = 0  # of the kept rows, with their prompts
    _words: set[frozenset[str]] = field(default_factory=set)  # the telling ones of each kept message
    _openings: Counter[str] = field(default_factory=Counter)  # the first words of kept messages
    _declined: int = 0  # kept answers that decline

    @property
    def done(self) -> int:
        """The tokens so far, or the draws if the user gave prompts."""
        return self.tokens if self.options.tokens else len(self.draws)

    def add(self, draw: Draw) -> None:
        draw = replace(draw, refused=draw.refused or self._fault(draw))
        self.draws.append(draw)
        if draw.refused:
            self.refused[draw.refused] += 1
        else:
            self.kept.append(draw)
            self.tokens += draw.prompt_tokens + draw.answer_tokens

    def _fault(self, draw: Draw) -> str | None:
        """Returns the first rule that a draw breaks. A draw that breaks none counts for the next ones."""
        message = draw.messages[-1]["content"] if draw.messages else draw.answer
        words = re.findall(r"\w+", message.lower()) or [message]
        telling = frozenset(word for word in words if len(word) > 3 or word.isdigit()) or frozenset(words)
        opening = " ".join(words[:3])
        declines = bool(DECLINES.search(draw.answer[:160]))
        if not self.options.prompts:  # which may be alike
            if telling in self._words:
                return "message: near-duplicate"
            if self._openings[opening] >= max(FREE, ALIKE * len(self.kept)):
                return "message: common opening"
        if declines and self._declined >= max(FREE, DECLINED * len(self.kept)):
            return "answer: declines"
        self._words.add(telling)
        self._openings[opening] += 1
        self._declined += declines
        return None

    def summary(self) -> Iterator[str]:
        """Yields a table of the kinds with means of the kept answers, the reasons of refusal, and examples."""
        rows = [("kind", "draws", "kept", "tokens of an answer", "repetition")]
        for kind, count in Counter(draw.kind for draw in self.draws).items():
            kept = [draw for draw in self.kept if draw.kind == kind]
            tokens, repeated = sum(draw.answer_tokens for draw in kept), sum(draw.repetition for draw in kept)
            means = f"{tokens / max(1, len(kept)):.0f}", format_percent(repeated / max(1, len(kept)))
            rows.append((kind or "-", f"{count:,}", f"{len(kept):,}", *means))
        yield from aligned(rows, "<>>>>")
        yield from (f"{count:>7,} refused, {reason}" for reason, count in self.refused.most_common())
        for draw in self.kept[:: max(1, len(self.kept) // EXAMPLES)][:EXAMPLES]:
            yield f"\n--- draw {draw.number}, {draw.kind}"
            yield from (f"{message['role']}: {message['content']}" for message in draw.messages)
            yield f"assistant: {draw.answer}" if draw.messages else draw.answer
        yield f"\n{len(self.kept):,} rows of {self.tokens:,} tokens are in {self.options.out}"


def collect(options: Namespace, ranks: Communicator) -> Selection:
    """Draws until the kept rows have enough tokens, and writes them. Collective.

    `options` are those of cli/chats.py. A killed command goes on: every draw is a flushed line of a journal.
    """
    source = ranks.all_or_raise(lambda: find_model(options.model))
    tokenizer = ranks.all_or_raise(lambda: load_tokenizer(source.tokenizer_folder))
    drawer, selection = Drawer(options, source, tokenizer, ranks), Selection(options)
    settings, journal = ranks.all_or_raise(lambda: drawer.settings), options.out.with_suffix(".draws.jsonl")
    earlier = ranks.write_on_rank_0(journal, lambda: _open_journal(journal, options.out, settings))
    for draw in ranks.gather_objects(earlier)[0] or []:
        selection.add(draw)
    total, unit = (options.tokens, " tokens") if options.tokens else (len(options.prompts.prompts), " prompts")
    with tqdm(total=total, unit=unit, initial=selection.done, disable=ranks.rank > 0) as progress:
        while selection.done < total:
            count, reasons = len(selection.draws), ", ".join(selection.refused)
            require(bool(selection.kept) or count < HOPELESS, f"none of {count} draws is fit: {reasons}")
            numbers = range(count + ranks.rank, count + ROUND * ranks.world_size, ranks.world_size)
            with fast_half_products("" if settings["engine"] == "vllm" else settings["dtype"]):  # vLLM has its own
                shares = ranks.gather_objects(ranks.all_or_raise(partial(drawer.draw, numbers)))
            draws = sorted(chain(*shares), key=lambda draw: draw.number)
            ranks.write_on_rank_0(journal, partial(_append, journal, draws))
            for draw in draws:
                selection.add(draw)
            progress.set_postfix_str(f"{len(selection.draws):,} draws, {len(selection.kept):,} kept", refresh=False)
            progress.update(selection.done - progress.n)
    ranks.write_on_rank_0(options.out, lambda: _write(selection, options.out, settings))
    return selection


def _open_journal(journal: Path, out: Path, settings: dict[str, Any]) -> list[Draw]:
    """Returns the draws of an earlier start. Drops a line that was not finished."""
    fresh = not journal.exists()
    require(not (fresh and out.exists()), f"--out {out} exists without {journal.name} to go on from; give another name")
    first, *lines = (_lines(settings) if fresh else journal.read_text(encoding="utf-8")).split("\n")[:-1]
    saved = json.loads(first)
    differ = ", ".join(key for key in settings if settings[key] != saved.get(key))
    require(not differ, f"{journal} is of another request ({differ} differs); give another --out")
    write_text(journal, "\n".join([first, *lines, ""]))
    return [Draw(**json.loads(line)) for line in lines]


def _append(journal: Path, draws: Sequence[Draw]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(_lines(*draws))


def _write(selection: Selection, out: Path, settings: dict[str, Any]) -> None:
    write_text(out, _lines(*(draw.row for draw in selection.kept)))
    counts = {"rows": len(selection.kept), "tokens": selection.tokens, "draws": len(selection.draws)}
    refused = {"refused": dict(selection.refused.most_common())}
    write_json(out.with_suffix(".settings.json"), settings | counts | refused)


def _lines(*rows: object) -> str:
    return "".join(json_text(row, ensure_ascii=False) for row in rows)
