"""Chats that a model writes itself, to tune its pruned copy on: which draws are kept, and how a command goes on."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from loraprune_ds.chats.draws import Draw, Drawer
from loraprune_ds.chats.selection import Selection
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, json_text, write_json, write_text
from loraprune_ds.generate.models import find_model
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import fast_half_products

HOPELESS = 1000  # draws of which one must be kept
SETTINGS = TypeAdapter(JsonObject)  # the first line of a journal
DRAW = TypeAdapter(Draw)  # each other line


def collect(options: Namespace, ranks: Communicator) -> Selection:
    """Draws until the kept rows have enough tokens, and writes them. Collective.

    `options` are those of cli/chats.py. A killed command goes on: every draw is a flushed line of a journal.
    """
    source = ranks.all_or_raise(lambda: find_model(options.model))
    tokenizer = ranks.all_or_raise(lambda: load_tokenizer(source.tokenizer_folder))
    drawer = Drawer(options, source, tokenizer, ranks)
    settings = ranks.all_or_raise(lambda: drawer.settings)
    selection = Selection(options)
    journal = options.out.with_suffix(".draws.jsonl")
    earlier = ranks.write_on_rank_0(journal, lambda: _open_journal(journal, options.out, settings))
    for draw in ranks.from_rank_0(earlier) or []:
        selection.add(draw)
    half = "" if settings["engine"] == "vllm" else settings["dtype"]  # vLLM has its own products
    display = _Display(selection, drawer)
    with display.bar:
        while selection.done < selection.total:
            count = len(selection.draws)
            require(
                bool(selection.kept) or count < HOPELESS,
                f"none of {count} draws is fit: {', '.join(selection.refused)}",
            )
            missing = selection.missing(options.batch_size * ranks.world_size)
            numbers = [number for number in missing if number % ranks.world_size == ranks.rank]
            with fast_half_products(half):
                share = ranks.all_or_raise(partial(drawer.draw, numbers, display.tick))
                shares = ranks.gather_objects(share)
            draws = sorted(chain(*shares), key=lambda draw: draw.number)
            ranks.write_on_rank_0(journal, partial(_append, journal, draws))
            for draw in draws:
                selection.add(draw)
            display.tick()
    ranks.write_on_rank_0(options.out, lambda: _write(selection, options.out, settings))
    return selection


class _Display:
    """A bar of what is kept. It also shows what this rank has in work, so that each token is a sign of life."""

    def __init__(self, selection: Selection, drawer: Drawer) -> None:
        self._selection = selection
        self._drawer = drawer
        self._written = 0
        self.bar = tqdm(
            total=selection.total,
            initial=selection.done,
            unit=" tokens" if selection.options.tokens else " prompts",
            disable=drawer.ranks.rank > 0,
            mininterval=1.0 if sys.stderr.isatty() else 10.0,
            miniters=0,  # a token in work moves nothing, but is shown
        )

    def tick(self, tokens: int = 0) -> None:
        """Counts tokens that this rank writes."""
        self._written += tokens
        selection = self._selection
        drawer = self._drawer
        working = f"{self._written:,} tokens written, {len(drawer.in_work)} in work"
        if drawer.ranks.world_size > 1:
            working += " on rank 0"
        # a narrow terminal loses this first
        kept = f"{len(selection.kept):,} of {len(selection.draws):,} draws kept"
        self.bar.set_postfix_str(f"{working}, {kept}", refresh=False)
        self.bar.update(selection.done - self.bar.n)


def _open_journal(journal: Path, out: Path, settings: JsonObject) -> list[Draw]:
    """Returns the draws of an earlier start. Drops a line that was not finished."""
    if not journal.exists():
        require(
            not out.exists(),
            f"--out {out} exists without {journal.name} to go on from; give another name",
        )
        write_text(journal, _lines(settings))
    *lines, unfinished = journal.read_bytes().split(b"\n")
    earlier, *draws = _parse(lines or [b""], journal, out)
    differ = ", ".join(key for key in settings if settings[key] != earlier.get(key))
    require(not differ, f"{journal} is of another request ({differ} differs); give another --out")
    if unfinished:
        os.truncate(journal, journal.stat().st_size - len(unfinished))
    return draws


def _parse(lines: list[bytes], journal: Path, out: Path) -> list[Any]:
    """Returns the settings in the first line of a journal, and the draws in the others."""
    parsed: list[Any] = []
    kind: TypeAdapter[Any] = SETTINGS
    remedy = f"the file and any {out.name} to start over"
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(kind.validate_json(line))
        except ValidationError:
            raise UserError(
                f"{journal}, line {number} is damaged; delete {remedy}, or give another --out"
            ) from None
        kind = DRAW
        remedy = "the line, which is then drawn again"
    return parsed


def _append(journal: Path, draws: Sequence[Draw]) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(_lines(*draws))


def _write(selection: Selection, out: Path, settings: JsonObject) -> None:
    write_text(out, _lines(*(draw.row for draw in selection.kept)))
    facts = {
        **settings,
        "rows": len(selection.kept),
        "tokens": selection.tokens,
        "draws": len(selection.draws),
        "refused": dict(selection.refused.most_common()),
    }
    write_json(out.with_suffix(".settings.json"), facts)


def _lines(*rows: object) -> str:
    return "".join(json_text(row, ensure_ascii=False) for row in rows)
