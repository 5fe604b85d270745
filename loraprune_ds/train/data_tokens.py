"""From text to samples: documents packed to windows, or instructions with the prompt left out of the loss."""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data import Ragged, Samples

PADDING_ID = 0  # every model has it, and nothing looks at it
BATCH = 1000  # texts tokenised at a time
PROMPT = "Answer the request.\n\n### Request\n{prompt}\n\n### Answer\n"
PROMPT_WITH_INPUT = "Answer the request about the text.\n\n### Request\n{prompt}\n\n### Text\n{input}\n\n### Answer\n"

T = TypeVar("T")


@dataclass(frozen=True)
class Instruction:
    """What the model is asked and what it should say."""

    prompt: str
    response: str


def make_instruction(prompt: str, material: str, response: str) -> Instruction:
    """Puts a request, and the text it is about if there is one, into words."""
    template = PROMPT_WITH_INPUT if material else PROMPT
    return Instruction(template.format(prompt=prompt, input=material), response)


def pack_documents(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, window: int, max_samples: int | None
) -> Samples:
    """One stream of all documents, with the tokenizer's EOS between them, cut to windows; the tail is dropped."""
    eos = _eos(tokenizer)
    stream = array("i")
    for batch in _batches(document for document in documents if document):
        for ids in _ids(batch, tokenizer, special=True):
            if stream and eos is not None and stream[-1] != eos:  # some tokenizers end a text with it themselves
                stream.append(eos)
            stream.extend(ids)
        if max_samples is not None and len(stream) >= max_samples * window:
            break
    count = len(stream) // window if max_samples is None else min(max_samples, len(stream) // window)
    windows = torch.from_numpy(np.asarray(stream[: count * window], dtype=np.int32)).view(count, window)
    return Samples(input_ids=windows, labels=windows)


def mask_prompts(
    instructions: Iterable[Instruction], tokenizer: PreTrainedTokenizerBase, window: int, max_samples: int | None
) -> Samples:
    """One sample per instruction: prompt (not predicted), response, EOS; cut to the window.

    Prompt and response are tokenised apart, so the mask ends exactly between them. Samples of which nothing is left to
    predict are left out.
    """
    ids, labels = array("i"), array("i")
    starts = array("q", [0])
    left_out = 0
    for prompt, response in _tokenize_instructions(instructions, tokenizer):
        answer = response[: max(0, window - len(prompt))]
        if not answer or len(prompt) + len(answer) < 2:  # nothing predicts a first token
            left_out += 1
            continue
        ids.extend(prompt + answer)
        labels.extend([IGNORE_INDEX] * len(prompt) + answer)
        starts.append(len(ids))
        if len(starts) - 1 == max_samples:
            break
    offsets = torch.from_numpy(np.asarray(starts, dtype=np.int64))
    return Samples(
        input_ids=Ragged(torch.from_numpy(np.asarray(ids, dtype=np.int32)), offsets, window, PADDING_ID),
        labels=Ragged(torch.from_numpy(np.asarray(labels, dtype=np.int32)), offsets, window, IGNORE_INDEX),
        left_out=left_out,
    )


def _tokenize_instructions(
    instructions: Iterable[Instruction], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    eos = _eos(tokenizer)
    for batch in _batches(instructions):
        prompts = _ids([instruction.prompt for instruction in batch], tokenizer, special=True)
        responses = _ids([instruction.response for instruction in batch], tokenizer, special=False)
        for prompt, response in zip(prompts, responses, strict=True):
            if eos is not None and prompt[-1:] == [eos]:  # a tokenizer that ends every text
                prompt = prompt[:-1]
            if eos is not None and response:
                response = [*response, eos]
            yield prompt, response


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]  # pyright: ignore[reportReturnType]


def _eos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    eos = tokenizer.eos_token_id
    assert eos is None or isinstance(eos, int)
    return eos


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
