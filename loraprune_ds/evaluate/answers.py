"""Texts that a model writes: their length, end and repetition, and how close it is to the dense model.

Repetition is the share of an answer's 4-grams that occurred in it before, averaged over the answers (seq-rep-4 of
Welleck et al., arXiv 1908.04319). Greedy text that repeats itself is easy to predict: read the dense model's
perplexity next to the repetition.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.evaluate.closeness import Closeness, frozen_head, last_hidden, measure_closeness
from loraprune_ds.evaluate.perplexity import Batch
from loraprune_ds.evaluate.prompts import AnswerSettings
from loraprune_ds.model.token_loss import IGNORE_INDEX, token_losses

AT_ONCE = 16  # answers that are written together
GRAM = 4


@dataclass(frozen=True)
class Answer:
    """One text. `tokens` counts no end token. `ended`: whether the model wrote one."""

    text: str
    tokens: int
    ended: bool
    repetition: float


@dataclass(frozen=True)
class Answers:
    """All answers of one kind, with their means."""

    tokens: float
    ended: float
    repetition: float
    dense_perplexity: float | None  # of the answers and their ends, after the prompts. None without a dense model
    texts: list[Answer]


@dataclass(frozen=True)
class Generation:
    """The texts of one model."""

    chat_template: bool
    greedy: Answers
    sampled: Answers
    closeness: Closeness | None = None  # None without a dense model or a text


@dataclass(frozen=True)
class Writer:
    """A loaded model and the ids of its prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]

    @property
    def ends(self) -> set[int]:
        """Returns the ids that end an answer, named by the model's settings or by its tokenizer."""
        settings: Any = self.model.generation_config
        named = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        return {token for token in (*named, self.tokenizer.eos_token_id) if isinstance(token, int)}


def encode_prompts(
    settings: AnswerSettings, tokenizer: PreTrainedTokenizerBase, path: str, most: int | None
) -> list[list[int]]:
    """Returns the ids of each prompt: by the chat template of the model `path`, or as plain text if it has none."""
    encoded: list[list[int]] = []
    for prompt in settings.prompts:
        where = f"--answers: {settings.name}, row {prompt.row}"
        try:
            if tokenizer.chat_template:
                made: Any = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
            else:
                made = tokenizer(prompt.text)
        except Exception as error:  # a template can hold any code
            raise UserError(f"{where}: the chat template of {path} refuses it: {one_line(error)}") from error
        encoded.append(list(made["input_ids"]))
        require(
            not most or len(encoded[-1]) + settings.max_new_tokens <= most,
            f"{where}: {path} reads at most {most} tokens (max_position_embeddings), not a prompt of "
            f"{len(encoded[-1])} and {settings.max_new_tokens} new ones",
        )
    return encoded


def generate_answers(
    writers: list[Writer], batches: list[Batch], settings: AnswerSettings, batch_size: int | None
) -> list[Generation]:
    """Returns the texts of each model. The second is the dense one, which also reads those of the first."""
    dense = writers[1].model if len(writers) > 1 else None
    made = [_generate(writer, dense, settings, batch_size or AT_ONCE) for writer in writers]
    if dense is not None and batches:
        made[0] = replace(made[0], closeness=measure_closeness(dense, writers[0].model, batches))
    return made


def _generate(writer: Writer, dense: PreTrainedModel | None, settings: AnswerSettings, batch_size: int) -> Generation:
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    kinds = []
    for how in ({"do_sample": False}, sampling):
        torch.manual_seed(settings.seed)
        written = list(_write(writer, how | {"max_new_tokens": settings.max_new_tokens}, batch_size))
        perplexity = None if dense is None else _perplexity(dense, writer.prompts, written, batch_size)
        kinds.append(_summarise([_answer(ids, writer) for ids in written], perplexity))
    return Generation(bool(writer.tokenizer.chat_template), *kinds)


def _write(writer: Writer, how: dict[str, Any], batch_size: int) -> Iterator[list[int]]:
    """Yields the new ids for each prompt, with the end token if the model wrote one."""
    model: Any = writer.model
    ends = sorted(writer.ends)
    # The model's own settings may forbid repetition, which would hide it. These replace them.
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=min(ends, default=0), **how)
    for start in range(0, len(writer.prompts), batch_size):
        rows = writer.prompts[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        for row in model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist():
            yield row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


def _answer(ids: list[int], writer: Writer) -> Answer:
    ended = ids[-1] in writer.ends
    words = ids[:-1] if ended else ids
    text = cast(str, writer.tokenizer.decode(words))  # with special tokens, which a broken model may write
    return Answer(text, len(words), ended, repetition(words))


def repetition(ids: list[int]) -> float:
    """Returns the share of 4-grams that occurred before. A shorter text repeats nothing."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def _summarise(answers: list[Answer], dense_perplexity: float | None) -> Answers:
    return Answers(
        fmean(one.tokens for one in answers),
        fmean(one.ended for one in answers),
        fmean(one.repetition for one in answers),
        dense_perplexity,
        answers,
    )


@torch.no_grad()
def _perplexity(model: PreTrainedModel, prompts: list[list[int]], written: list[list[int]], batch_size: int) -> float:
    """Returns the model's perplexity of all that was written after the prompts."""
    total, rows = 0.0, list(zip(prompts, written, strict=True))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(prompt) + len(ids) for prompt, ids in part)
        # What follows a text does not change its losses, so any id fills the rows.
        ids = torch.tensor([(p + w + [0] * width)[:width] for p, w in part], device=model.device)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for i, (prompt, new) in enumerate(part):
            span = slice(len(prompt), len(prompt) + len(new))
            labels[i, span] = ids[i, span]
        total += token_losses(last_hidden(model, ids), frozen_head(model), labels).double().sum().item()
    mean = total / sum(map(len, written))
    return math.inf if mean > 700 else math.exp(mean)
