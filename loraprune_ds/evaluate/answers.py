"""Answers that a model writes: their length, end and repetition, and how close it is to the dense model.

Repetition is the share of an answer's 4-grams that occurred in it before, averaged over the answers (seq-rep-4 of
Welleck et al., arXiv 1908.04319). Greedy text that repeats itself is easy to predict: read the dense model's
perplexity next to the repetition.

The pruned model's next-token probabilities q are compared with the dense model's, p. The overlap is the mean of
Σ min(p, q). Speculative sampling accepts this share of the tokens that q drafts for p (Leviathan et al., arXiv
2211.17192).
"""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loraprune_ds.generate.models import Ids
from loraprune_ds.generate.prompts import AnswerSettings
from loraprune_ds.generate.repetition import repetition
from loraprune_ds.generate.writer import Writer
from loraprune_ds.model.logits import Head, chunk_size, logits_transform, output_head
from loraprune_ds.model.perplexity import Labelled, Losses, Progress
from loraprune_ds.model.token_loss import IGNORE_INDEX, final_hidden, token_losses
from loraprune_ds.pretrained.windows import label_answers

AT_ONCE = 32  # answers that are written together
# So many turns that another program slows both models. A token of a longer answer takes about as long.
TIMED_AT_ONCE = 10
TIMED_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """One text. `tokens` excludes the end token. `ended` is True if the model wrote one after a text."""

    text: str
    tokens: int
    ended: bool
    repetition: float
    empty: bool  # apart from spaces and special tokens


@dataclass(frozen=True)
class Means:
    """Means over several answers."""

    tokens: float
    ended: float
    repetition: float
    empty: float
    # of the answers and their ends, after the prompts. None without a dense model
    dense_perplexity: float | None


@dataclass(frozen=True)
class Answers(Means):
    """All greedy or all sampled answers, with their means."""

    by_kind: dict[str, Means]  # over the answers to each kind of prompt
    exact_match: float | None  # share of the answers that equal their targets. None without targets
    rouge_l: float | None  # mean F-measure of the longest common subsequence of words, stemmed
    texts: list[Answer]


@dataclass(frozen=True)
class Closeness:
    """Compares two models on a text. All values are means over `predictions` tokens."""

    text: str
    agreement: float  # share of positions where both models find the same token most probable
    overlap: float
    kl: float  # KL(dense ‖ pruned), in nats
    predictions: int


@dataclass(frozen=True)
class Generation:
    """The answers of one model."""

    chat_template: bool
    greedy: Answers
    sampled: Answers
    tokens_per_second: float = field(compare=False)
    closeness: Closeness | None = None  # None without a dense model


@torch.no_grad()
def write_answers(
    writers: list[Writer],
    settings: AnswerSettings,
    batch_size: int | None = None,
    text: tuple[str, Iterable[Labelled]] | None = None,
    progress: Progress = lambda rounds, _: rounds,
) -> list[Generation]:
    """Returns the answers of each model. The second model is dense, and also reads the first one's answers.

    Args:
        text: a name and batches, on which the two models are compared. None: the dense model's greedy answers.
    """
    size = batch_size or AT_ONCE
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": settings.top_k}
    written: list[list[list[Ids]]] = []
    for writer in writers:
        greedy = _write(writer, {"do_sample": False}, settings, size, progress)
        written.append([greedy, _write(writer, sampling, settings, size, progress)])
    dense = writers[1] if len(writers) > 1 else None
    losses = losses_of(dense.model) if dense else None

    def summarise(writer: Writer, answers: list[Ids]) -> Answers:
        if losses is None:
            return _summarise(writer, answers, None, settings)
        batches = _labelled(writer, answers, size)
        sums = [losses(ids, labels).double().sum(1).cpu() for ids, labels in batches]
        return _summarise(writer, answers, torch.cat(sums), settings)

    speeds = measure_speed(writers, settings)
    generations: list[Generation] = []
    for writer, texts, speed in zip(writers, written, speeds, strict=True):
        greedy, sampled = (summarise(writer, answers) for answers in texts)
        templated = bool(writer.tokenizer.chat_template)
        generations.append(Generation(templated, greedy, sampled, speed))
    if dense is not None:
        if text is None:
            text = "the dense model's greedy answers", _labelled(dense, written[1][0], size)
        name, batches = text
        closeness = measure_closeness(dense.model, writers[0].model, batches, name)
        generations[0] = replace(generations[0], closeness=closeness)
    return generations


@torch.no_grad()
def measure_speed(writers: list[Writer], settings: AnswerSettings) -> list[float]:
    """Returns the tokens per second of each model. All write equally many tokens after the same prompts, by turns.

    The models must have written before, which makes kernels and caches ready.
    """
    count = min(TIMED_TOKENS, settings.max_new_tokens)
    prompts = writers[0].prompts
    seconds = [0.0] * len(writers)
    for start in range(0, len(prompts), TIMED_AT_ONCE):
        for i, writer in enumerate(writers):
            batch = writer.prompts[start : start + TIMED_AT_ONCE]
            began = perf_counter()
            # no answer ends, so that both do the same
            list(writer.write(batch, max_new_tokens=count, min_new_tokens=count, do_sample=False))
            seconds[i] += perf_counter() - began
    return [len(prompts) * count / spent for spent in seconds]


def _write(
    writer: Writer,
    choice: dict[str, Any],
    settings: AnswerSettings,
    batch_size: int,
    progress: Progress,
) -> list[Ids]:
    torch.manual_seed(settings.seed)
    written: list[Ids] = []
    for start in progress(range(0, len(writer.prompts), batch_size), "answers"):
        batch = writer.prompts[start : start + batch_size]
        written += writer.write(batch, max_new_tokens=settings.max_new_tokens, **choice)
    return written


def _summarise(
    writer: Writer, written: list[Ids], losses: Tensor | None, settings: AnswerSettings
) -> Answers:
    """Measures the answers. `losses` are the dense model's, (answers,), each summed over an answer and its end."""
    answers: list[Answer] = []
    for ids in written:
        ended = ids[-1] in writer.ends
        words = ids[:-1] if ended else ids
        # with special tokens, which a broken model may write
        text = cast(str, writer.tokenizer.decode(words))
        empty = not cast(str, writer.tokenizer.decode(words, skip_special_tokens=True)).strip()
        answers.append(Answer(text, len(words), ended and not empty, repetition(words), empty))

    def means(rows: list[int]) -> Means:
        names = ("tokens", "ended", "repetition", "empty")
        measured = {name: fmean(getattr(answers[i], name) for i in rows) for name in names}
        perplexity = None
        if losses is not None:
            count = sum(len(written[i]) for i in rows)
            perplexity = (losses[rows].sum() / count).exp().item()
        return Means(**measured, dense_perplexity=perplexity)

    rows: dict[str, list[int]] = {}  # of each kind
    for row, prompt in enumerate(settings.prompts):
        if prompt.kind:
            rows.setdefault(prompt.kind, []).append(row)
    exact_match = rouge_l = None
    if settings.targets:
        texts = [answer.text for answer in answers]
        pairs = list(zip(settings.targets, texts, strict=True))
        exact_match = fmean(target.strip() == text.strip() for target, text in pairs)
        rouge_l = _rouge_l(pairs)
    overall = means([*range(len(answers))])
    return Answers(
        **vars(overall),
        by_kind={kind: means(of_kind) for kind, of_kind in rows.items()},
        exact_match=exact_match,
        rouge_l=rouge_l,
        texts=answers,
    )


def _rouge_l(pairs: list[tuple[str, str]]) -> float:
    rouge: Any = importlib.import_module("rouge_score.rouge_scorer")
    scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
    return fmean(scorer.score(target, text)["rougeL"].fmeasure for target, text in pairs)


def _labelled(writer: Writer, written: list[Ids], batch_size: int) -> Iterator[Labelled]:
    """Yields batches of prompts with their answers. Only the answers have labels."""
    start = [] if writer.start is None else [writer.start]
    rows = [(prompt + start, ids) for prompt, ids in zip(writer.prompts, written, strict=True)]
    for i in range(0, len(rows), batch_size):
        ids, labels = label_answers(rows[i : i + batch_size])
        yield ids.to(writer.model.device), labels.to(writer.model.device)


def losses_of(model: PreTrainedModel) -> Losses:
    head = frozen_head(model)
    return lambda ids, labels: token_losses(final_hidden(model, ids, labels), head, labels)


@torch.no_grad()
def measure_closeness(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Iterable[Labelled], text: str
) -> Closeness:
    """Compares next-token probabilities on the labelled tokens of a text. Both models must tokenise it alike."""
    models = (dense, pruned)
    heads = [frozen_head(model) for model in models]
    vocabulary = min(len(head.weight) for head in heads)  # an embedding may be padded
    total = torch.zeros(3, dtype=torch.float64)
    count = 0
    for input_ids, labels in batches:
        predicted = labels[:, 1:] != IGNORE_INDEX
        chunks: list[tuple[Tensor, ...]] = []
        for model in models:
            hidden = final_hidden(model, input_ids, labels)[:, :-1][predicted]
            chunks.append(hidden.split(chunk_size(vocabulary)))
        for rows in zip(*chunks, strict=True):
            logits = [head.logits(part) for head, part in zip(heads, rows, strict=True)]
            log_p, log_q = (part[:, :vocabulary].float().log_softmax(1) for part in logits)
            p = log_p.exp()
            q = log_q.exp()
            same = (p.argmax(1) == q.argmax(1)).sum()
            overlap = p.minimum(q).sum()
            kl = (p * (log_p - log_q)).sum()
            total += torch.stack([same, overlap, kl]).double().cpu()
            count += len(p)
    agreement, overlap, kl = (total / count).tolist()
    return Closeness(text, agreement, overlap, kl, count)


def frozen_head(model: PreTrainedModel) -> Head:
    """Returns the head that makes logits of final hidden states."""
    return Head(output_head(model).weight, logits_transform(model.config))
