"""Texts that are sampled side by side, by transformers or vLLM. Each follows from its own seed, in any batch."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from loraprune_ds.generate.models import Ids
from loraprune_ds.generate.writer import Writer

Tick = Callable[[int], None]  # is told how many tokens are being written
CHUNK = 48  # tokens after which finished texts leave their batch, and others take their place
# likeliest tokens, of which `top_p` takes some. A sort of all would take longer than the model
NUCLEUS = 512


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends. The names are Hugging Face's."""

    max_new_tokens: int
    temperature: float
    top_p: float
    eos_token_id: list[int]


@dataclass
class Text:
    """A text after a prompt, as far as it is written."""

    prompt: Ids
    seed: int
    how: Sampling
    ids: Ids = field(default_factory=list)  # with the id that ended it
    ended: bool = False

    @property
    def whole(self) -> Ids:
        return self.prompt + self.ids

    @property
    def room(self) -> int:
        """The most tokens that may follow."""
        return self.how.max_new_tokens - len(self.ids)

    @cached_property
    def numbers(self) -> Tensor:
        """One number in [0, 1) for each token, which chooses it. And a chunk more, for a batch with longer texts."""
        count = self.how.max_new_tokens + CHUNK
        return torch.rand(count, generator=torch.Generator().manual_seed(self.seed))

    def add(self, ids: Ids) -> None:
        """Adds ids up to the first that ends the text."""
        end = next((i + 1 for i, token in enumerate(ids) if token in self.how.eos_token_id), None)
        self.ids += ids[:end][: self.room]
        self.ended = end is not None or not self.room


def extend(writer: Writer, batch_size: int, texts: Sequence[Text], tick: Tick) -> None:
    """Writes at most CHUNK tokens after each text, in batches of similar length."""
    ordered = sorted(texts, key=lambda text: len(text.whole))
    for start in range(0, len(ordered), batch_size):
        _extend_batch(writer, ordered[start : start + batch_size], tick)


def _extend_batch(writer: Writer, batch: list[Text], tick: Tick) -> None:
    device = writer.model.device
    begun = [text.whole for text in batch]
    width = max(map(len, begun))
    ends = torch.tensor(sorted(writer.ends), dtype=torch.int64, device=device)
    numbers = torch.stack([text.numbers[len(text.ids) :][:CHUNK] for text in batch]).to(device)
    nucleus = torch.tensor(
        [(text.how.temperature, text.how.top_p) for text in batch], device=device
    )

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        new = ids[:, width:]
        tick(len(batch) - int(torch.isin(new, ends).any(1).sum()))
        return leave_one(nucleus, numbers[:, new.shape[1], None], scores)

    most = min(CHUNK, max(text.room for text in batch))
    rows = writer.write(begun, LogitsProcessorList([choose]), max_new_tokens=most, do_sample=False)
    for text, ids in zip(batch, rows, strict=True):
        text.add(ids)


def leave_one(nucleus: Tensor, number: Tensor, scores: Tensor) -> Tensor:
    """Leaves one token in each row of `scores`: where a number falls in the cumulative probabilities of the nucleus.

    Args:
        nucleus: the temperature and `top_p` of each row, (rows, 2).
        number: in [0, 1), (rows, 1).
    """
    temperature, top_p = nucleus.split(1, dim=1)
    top = scores.topk(min(NUCLEUS, scores.shape[1]))
    p = (top.values / temperature).softmax(1)
    p = torch.where(p.cumsum(1) - p < top_p, p, 0.0).cumsum(1)
    at = torch.searchsorted(p, number * p[:, -1:], right=True).clamp(max=p.shape[1] - 1)
    return torch.full_like(scores, -torch.inf).scatter(1, top.indices.gather(1, at), 0.0)


def extend_by_vllm(engine: Any, texts: Sequence[Text], tick: Tick) -> None:
    """Writes each text to its end by `engine`, an LLM of vLLM."""
    parameters = importlib.import_module("vllm").SamplingParams
    settings = []
    for text in texts:
        given = {
            "temperature": text.how.temperature,
            "top_p": text.how.top_p,
            "max_tokens": text.how.max_new_tokens,
        }
        settings.append(
            parameters(
                **given, stop_token_ids=text.how.eos_token_id, ignore_eos=True, seed=text.seed
            )
        )
    prompts = [{"prompt_token_ids": text.prompt} for text in texts]
    for text, made in zip(texts, engine.generate(prompts, settings, use_tqdm=False), strict=True):
        text.add(list(made.outputs[0].token_ids))
        text.ended = True
        tick(len(text.ids))
