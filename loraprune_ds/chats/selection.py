"""Chooses the draws that are kept, by rules on words, openings and refusals."""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from loraprune_ds.chats.draws import DATA, Draw
from loraprune_ds.units import aligned, format_percent

DECLINES = re.compile(rf"\b({'|'.join(DATA['declines'])})", re.IGNORECASE)
# most of the kept rows that begin with the same three words, and that decline
ALIKE, DECLINED = 0.03, 0.05
FREE = 5  # rows of either that are kept before the shares count
EXAMPLES = 10


@dataclass
class Selection:
    """Takes draws in the order of their numbers until the kept rows have enough tokens.

    It keeps no near-duplicates, and few that decline or begin alike.
    """

    options: Namespace  # of cli/chats.py
    draws: list[Draw] = field(default_factory=list)
    kept: list[Draw] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # the reasons
    tokens: int = 0  # of the kept rows, with their prompts
    # until the draws before them have ended
    _waiting: dict[int, Draw] = field(default_factory=dict)
    # the telling ones of each kept message
    _words: set[frozenset[str]] = field(default_factory=set)
    _openings: Counter[str] = field(default_factory=Counter)  # the first words of kept messages
    _declined: int = 0  # kept answers that decline

    @property
    def total(self) -> int:
        """The tokens or prompts that were asked for."""
        return self.options.tokens or len(self.options.prompts.prompts)

    @property
    def done(self) -> int:
        """The tokens so far, or the draws if the user gave prompts."""
        return self.tokens if self.options.tokens else len(self.draws)

    def missing(self, least: int) -> Iterator[int]:
        """Yields the numbers of the next draws that have not ended.

        Args:
            least: draws to look ahead, even if fewer will probably be enough.
        """
        count = len(self.draws)
        needed = self.total - self.done
        if self.options.tokens:
            # a long row more, as few draws say little
            mean = (self.tokens + self.options.max_new_tokens) / (count + 1)
            needed = max(least, ceil(needed / mean))
        for number in range(count, count + needed):
            if number not in self._waiting:
                yield number

    def add(self, draw: Draw) -> None:
        """Takes this draw and those that waited for it, or lets it wait."""
        self._waiting[draw.number] = draw
        while self.done < self.total and len(self.draws) in self._waiting:
            self._take(self._waiting.pop(len(self.draws)))

    def _take(self, draw: Draw) -> None:
        draw = replace(draw, refused=draw.refused or self._fault(draw))
        self.draws.append(draw)
        if draw.refused:
            self.refused[draw.refused] += 1
        else:
            self.kept.append(draw)
            self.tokens += draw.prompt_tokens + draw.answer_tokens

    def _fault(self, draw: Draw) -> str | None:
        """Returns the first rule that a draw breaks. A draw that breaks none counts for the next ones."""
        message = draw.messages[-1]["content"]
        words = re.findall(r"\w+", message.lower()) or [message]
        long_words = [word for word in words if len(word) > 3 or word.isdigit()]
        telling = frozenset(long_words or words)
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
            tokens = _mean([draw.answer_tokens for draw in kept])
            repeated = _mean([draw.repetition for draw in kept])
            rows.append(
                (
                    kind or "-",
                    f"{count:,}",
                    f"{len(kept):,}",
                    f"{tokens:.0f}",
                    format_percent(repeated),
                )
            )
        yield from aligned(rows, "<>>>>")
        for reason, count in self.refused.most_common():
            yield f"{count:>7,} refused, {reason}"
        step = max(1, len(self.kept) // EXAMPLES)
        for draw in self.kept[::step][:EXAMPLES]:
            yield f"\n--- draw {draw.number}, {draw.kind}"
            for message in draw.messages:
                yield f"{message['role']}: {message['content']}"
            yield f"assistant: {draw.answer}"
        yield f"\n{len(self.kept):,} rows of {self.tokens:,} tokens are in {self.options.out}"


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / max(1, len(values))
