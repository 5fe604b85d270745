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
from loraprune_ds.generate.writer import Writer, first_end

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
    sampling: Sampling
    ids: Ids = field(default_factory=list)  # with the id that ended it
    ended: bool = False

    @property
    def whole(self) -> Ids:
        return self.prompt + self.ids

    @property
    def room(self) -> int:
        """The most tokens that may follow."""
        return self.sampling.max_new_tokens - len(self.ids)

    @cached_property
    def generator(self) -> torch.Generator:
        """Draws the text's own noise, so that other texts of its batch change nothing."""
        return torch.Generator().manual_seed(self.seed)

    def add(self, ids: Ids) -> None:
        """Adds ids up to the first that ends the text."""
        end = first_end(ids, self.sampling.eos_token_id)
        self.ids += ids[:end][: self.room]
        self.ended = end is not None or not self.room


def extend(writer: Writer, batch_size: int, texts: Sequence[Text], tick: Tick) -> None:
    """Writes at most CHUNK tokens after each text, in batches of similar length."""
    ordered = sorted(texts, key=lambda text: len(text.whole))
    for start in range(0, len(ordered), batch_size):
        _extend_batch(writer, ordered[start : start + batch_size], tick)


def _extend_batch(writer: Writer, batch: list[Text], tick: Tick) -> None:
    device = writer.model.device
    prompts = [text.whole for text in batch]
    width = max(map(len, prompts))
    ends = torch.tensor(sorted(writer.ends), dtype=torch.int64, device=device)
    nucleus = [(text.sampling.temperature, text.sampling.top_p) for text in batch]
    limits = torch.tensor(nucleus, device=device)

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        ended = torch.isin(ids[:, width:], ends).any(1)
        tick(len(batch) - int(ended.sum()))
        return leave_one(limits, [text.generator for text in batch], scores)

    most = min(CHUNK, max(text.room for text in batch))
    rows = writer.write(
        prompts, LogitsProcessorList([choose]), max_new_tokens=most, do_sample=False
    )
    for text, ids in zip(batch, rows, strict=True):
        text.add(ids)


def leave_one(limits: Tensor, generators: Sequence[torch.Generator], scores: Tensor) -> Tensor:
    """Leaves one token of the nucleus in each row of `scores`, sampled by the generator of that row.

    Args:
        limits: the temperature and `top_p` of each row, (rows, 2).
    """
    temperature, top_p = limits.split(1, dim=1)
    top = scores.topk(min(NUCLEUS, scores.shape[1]))
    p = (top.values / temperature).softmax(1)
    in_nucleus = p.where(p.cumsum(1) - p < top_p, 0.0)
    # the largest of p / noise is a sample of p, and NaN raises nothing
    noise = [torch.empty(p.shape[1]).exponential_(generator=each) for each in generators]
    place = (in_nucleus / torch.stack(noise).to(p.device)).argmax(1, keepdim=True)
    token = top.indices.gather(1, place)
    return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def extend_by_vllm(engine: Any, texts: Sequence[Text], tick: Tick) -> None:
    """Writes each text to its end by `engine`, an LLM of vLLM."""
    vllm: Any = importlib.import_module("vllm")
    settings = [
        vllm.SamplingParams(
            temperature=text.sampling.temperature,
            top_p=text.sampling.top_p,
            max_tokens=text.sampling.max_new_tokens,
            stop_token_ids=text.sampling.eos_token_id,
            ignore_eos=True,
            seed=text.seed,
        )
        for text in texts
    ]
    prompts = [{"prompt_token_ids": text.prompt} for text in texts]
    requests = engine.generate(prompts, settings, use_tqdm=False)
    for text, request in zip(texts, requests, strict=True):
        text.add(list(request.outputs[0].token_ids))
        text.ended = True
        tick(len(text.ids))
