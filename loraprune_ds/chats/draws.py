"""Draws of chats: what a model writes as the user, then its answer, and what is wrong with either.

As in Magpie (Xu et al., arXiv 2406.08464), a model that reads its template up to the user's turn writes the user's
message, then its answer. A model left alone writes little code, extraction or arithmetic, so half of the messages begin
with an opening of such a kind.
"""

import importlib
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.models import Ids, ModelSource, choose_dtype, load_model
from loraprune_ds.generate.prompts import AnswerSettings, Message, Prompt
from loraprune_ds.generate.repetition import repetition
from loraprune_ds.generate.sampling import Sampling, Text, Tick, extend, extend_by_vllm
from loraprune_ds.generate.writer import Writer, end_ids
from loraprune_ds.model.families.base import PRUNED
from loraprune_ds.pretrained.tokenizer import rendering, token_ids
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.versions import has

DATA = read_json(Path(__file__).with_name("chats.json"))
KINDS, OPENINGS = DATA["kinds"], DATA["openings"]  # the kinds of the draws, in turn
MESSAGE = {"max_new_tokens": 96, "temperature": 0.8, "top_p": 0.95}  # the sampling of messages
ANSWER = {"temperature": 0.7, "top_p": 0.95}  # of answers
FEWEST_WORDS, MOST_REPETITION = 3, 0.2
BATCHES = 4  # of texts that a rank has in work, so that each batch has texts of similar length
MARK = "\u2042USER\u2042"
Part = Literal["message", "answer"]


@dataclass(frozen=True)
class Draw:
    """A conversation and its answer. `refused` says what is wrong with it."""

    number: int
    kind: str | None
    messages: list[Message]
    answer: str = ""
    prompt_tokens: int = 0  # with the template
    answer_tokens: int = 0  # without the end
    repetition: float = 0.0
    refused: str | None = None

    @property
    def row(self) -> JsonObject:
        """The row of `data.format` chat."""
        prompt = self.messages if len(self.messages) != 1 else self.messages[0]["content"]
        return {"prompt": prompt, "completion": self.answer}


@dataclass(frozen=True)
class Turn:
    """A part of a draw that is being written."""

    part: Part
    draw: Draw  # without this part. Before a message, its answer is the opening
    text: Text


@dataclass
class Drawer:
    """Makes draws. A draw follows from the seed and its number, apart from rounding in other batches."""

    options: Namespace  # of cli/chats.py
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    ranks: Communicator
    in_work: list[Turn] = field(default_factory=list)

    @cached_property
    def settings(self) -> JsonObject:
        """What decides the draws. Raises UserError if the model cannot make them."""
        options = self.options
        folder = self.source.pretrained.folder
        require(
            self.tokenizer.chat_template,
            f"{options.model} has no chat template, so it writes no chats",
        )
        require(
            not self.source.pretrained.shape.family.has_encoder,
            f"{options.model} has an encoder, which writes no chats",
        )
        if options.prompts:  # a row that does not fit is named before the first is answered
            self._encode(options.prompts, "--prompts")
        return {
            "model": options.model,
            "seed": options.seed,
            "engine": self._choose_engine(),
            "max_new_tokens": options.max_new_tokens,
            **ANSWER,
            "message": MESSAGE,
            "prompts": getattr(options.prompts, "sha256", None),
            # in the hub's cache
            "revision": folder.name if folder.parent.name == "snapshots" else None,
            "dtype": choose_dtype(self.source, None),
        }

    def _choose_engine(self) -> str:
        is_pruned = self.source.pretrained.shape.model_type.startswith(PRUNED)
        is_stock = not self.source.adapter and not is_pruned
        fits = has("vllm") and is_stock and self.ranks.world_size == 1
        require(
            fits or self.options.engine != "vllm",
            "--engine vllm needs that package, a stock model and one process",
        )
        return self.options.engine or ("vllm" if fits else "transformers")

    @cached_property
    def extend(self) -> Callable[[Sequence[Text], Tick], None]:
        """Writes some tokens after each text. Loads the model first."""
        dtype = self.settings["dtype"]
        if self.settings["engine"] == "vllm":
            vllm: Any = importlib.import_module("vllm")
            return partial(
                extend_by_vllm, vllm.LLM(str(self.source.pretrained.folder), dtype=dtype)
            )
        model = load_model(self.source, dtype, self.ranks.device)
        return partial(extend, Writer(model, self.tokenizer), self.options.batch_size)

    def draw(self, numbers: Iterable[int], tick: Tick = lambda _: None) -> list[Draw]:
        """Writes some tokens of each draw in work. Returns the draws that have ended.

        Args:
            numbers: draws to begin in this order, as far as there is room, unless they are in work.
        """
        in_work = {turn.draw.number for turn in self.in_work}
        room = BATCHES * self.options.batch_size - len(in_work)
        missing = (number for number in numbers if number not in in_work)
        self.in_work += [self._begin(number) for number in islice(missing, room)]
        self.extend([turn.text for turn in self.in_work], tick)
        turns = self.in_work
        self.in_work = [turn for turn in turns if not turn.text.ended]
        draws: list[Draw] = []
        for turn in turns:
            if turn.text.ended:
                draw = self._read(turn)
                if turn.part == "message" and not draw.refused:
                    self.in_work.append(self._answer(draw))
                else:
                    draws.append(draw)
        return draws

    def _begin(self, number: int) -> Turn:
        """Begins a draw: the answer to the user's prompt, or a message."""
        if self.options.prompts:
            prompt = self.options.prompts.prompts[number]
            return self._answer(Draw(number, prompt.kind, prompt.messages))
        kind = KINDS[number % len(KINDS)]
        opening = self._choose(OPENINGS[kind], number)
        before, end = self._user_turn
        (ids,) = token_ids([opening], self.tokenizer, special=False)
        return self._turn("message", Draw(number, kind, [], opening), before + ids, end)

    def _answer(self, draw: Draw) -> Turn:
        prompts = (Prompt(draw.number, draw.messages),)
        settings = AnswerSettings("draws", "", prompts, self.options.max_new_tokens)
        (ids,) = self._encode(settings, "chats")
        return self._turn("answer", draw, ids)

    def _turn(self, part: Part, draw: Draw, prompt: Ids, *ends: int) -> Turn:
        values: Any = MESSAGE
        if part != "message":
            values = {"max_new_tokens": self.options.max_new_tokens, **ANSWER}
        sampling = Sampling(**values, eos_token_id=[*self._ends, *ends])
        return Turn(part, draw, Text(prompt, self._hash(draw.number, part), sampling))

    @cached_property
    def _user_turn(self) -> tuple[Ids, int]:
        """The ids before the user's message in the template, and the special token after it."""
        path = self.options.model
        chat = [{"role": "user", "content": MARK}]
        with rendering("chats", path, chat):
            text: Any = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        before, _, after = text.partition(MARK)
        before_ids, after_ids = token_ids([before, after], self.tokenizer, special=False)
        require(
            bool(self._special & {*after_ids[:1]}),
            f"the chat template of {path} ends no message with a special token; give --prompts FILE",
        )
        return before_ids, after_ids[0]

    def _encode(self, settings: AnswerSettings, option: str) -> list[Ids]:
        """Returns the ids of prompts, without thinking where the template has that."""
        pretrained = self.source.pretrained
        most = pretrained.config.get("max_position_embeddings")
        limits = self.options.model, most, pretrained.shape.vocab_size
        return encode_prompts(settings, self.tokenizer, limits, option, enable_thinking=False)

    def _read(self, turn: Turn) -> Draw:
        """Returns the draw with the text of this turn, and says what is wrong with it."""
        ids = turn.text.ids
        ended = ids[-1] in turn.text.sampling.eos_token_id
        words = ids[:-1] if ended else ids
        text = turn.draw.answer + str(self.tokenizer.decode(words, skip_special_tokens=True))
        faults = {
            "special token": bool(self._special & {*words}),
            "unfinished": not ended,
            "empty": not str(self.tokenizer.decode(words)).strip(),
            "repetition": repetition(words) > MOST_REPETITION,
            "short": turn.part == "message" and len(text.split()) < FEWEST_WORDS,
        }
        reasons = (f"{turn.part}: {fault}" for fault, applies in faults.items() if applies)
        draw = replace(turn.draw, refused=next(reasons, None))
        if turn.part == "message":
            message = {"role": "user", "content": text.strip()}
            return replace(draw, messages=[message], answer="")
        return replace(
            draw,
            answer=text.strip(),
            prompt_tokens=len(turn.text.prompt),
            answer_tokens=len(words),
            repetition=repetition(words),
        )

    @cached_property
    def _ends(self) -> set[int]:
        """The ids that end a text, named by the model's settings or by its tokenizer."""
        pretrained = self.source.pretrained
        path = pretrained.folder / "generation_config.json"
        settings = read_json(path) if path.is_file() else pretrained.config
        return end_ids(settings.get("eos_token_id"), self.tokenizer)

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def _choose(self, texts: Sequence[str], number: int) -> str:
        return texts[self._hash(number, "opening") % len(texts)]

    def _hash(self, number: int, name: str) -> int:
        """Returns a seed of 32 bits. A CPU's generator ignores more."""
        digest = sha256(f"{self.options.seed}/{number}/{name}".encode()).digest()
        return int.from_bytes(digest[:4], "big")
