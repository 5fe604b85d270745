"""Makes samples from text. Documents fill windows. The prompts of instructions do not enter the loss."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.model.tokenizer import begin_with, eos_id, token_ids, tokenize_pairs
from loraprune_ds.train.data.samples import Samples

TEXTS_AT_ONCE = 1000  # texts per call of the tokenizer
PROMPT = "Answer the request.\n\n### Request\n{prompt}\n\n### Answer\n"
PROMPT_WITH_INPUT = "Answer the request about the text.\n\n### Request\n{prompt}\n\n### Text\n{input}\n\n### Answer\n"

T = TypeVar("T")
TokenizedRow = tuple[list[int], list[int]]  # ids and labels
Instruction = tuple[str, str]  # prompt and response


def make_instruction(prompt: str, about: str, response: str) -> Instruction:
    """Puts a request into the template, with the text `about` unless it is empty."""
    return (PROMPT_WITH_INPUT if about else PROMPT).format(prompt=prompt, input=about), response


def pack_documents(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_samples: int | None,
    start: int | None = None,
) -> Samples:
    """Concatenates all documents, with the tokenizer's EOS between them, and splits them into windows.

    An incomplete last window is dropped. `start` replaces each window's first id (`Starts.window`).
    """
    eos = eos_id(tokenizer)
    stream = array("i")
    for batch in in_batches(document for document in documents if document):
        for ids in token_ids(batch, tokenizer, special=True):
            if stream and eos is not None and stream[-1] != eos:  # some tokenizers add EOS
                stream.append(eos)
            stream.extend(ids)
        if max_samples is not None and len(stream) >= max_samples * window:
            break
    count = len(stream) // window
    count = count if max_samples is None else min(max_samples, count)
    return Samples.of_windows(begin_with(_tensor(stream[: count * window]).view(count, window), start))


def collect_rows(
    rows: Iterable[TokenizedRow], window: int, max_samples: int | None, places: Iterable[str] | None = None
) -> Samples:
    """Makes one sample from each row, cut at the window. Rows without predictions are left out.

    `places` name the origins of the rows.
    """
    ids, labels = array("i"), array("i")
    starts = array("q", [0])
    left_out, first = 0, ""
    for (row_ids, row_labels), place in zip(rows, repeat("") if places is None else places, strict=False):
        if all(label == IGNORE_INDEX for label in row_labels[1:window]):  # no token predicts the first
            left_out, first = left_out + 1, first or place
            continue
        ids.extend(row_ids[:window])
        labels.extend(row_labels[:window])
        starts.append(len(ids))
        if len(starts) - 1 == max_samples:
            break
    return Samples({"input_ids": _tensor(ids), "labels": _tensor(labels)}, _tensor(starts), window, left_out, first)


def mask_outside(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> list[int]:
    """Returns labels: the ids of tokens that overlap a span of characters, IGNORE_INDEX for the others.

    Args:
        offsets: the half-open range of characters of each token. Offsets and spans ascend.
    """
    labels, first = [IGNORE_INDEX] * len(ids), 0
    for begin, end in spans:
        while first < len(ids) and offsets[first][1] <= begin:
            first += 1
        while first < len(ids) and offsets[first][0] < end:
            labels[first] = ids[first]
            first += 1
    return labels


def tokenize_instructions(
    instructions: Iterable[Instruction], tokenizer: PreTrainedTokenizerBase, start: int | None = None
) -> Iterator[TokenizedRow]:
    """Makes ids and labels from instructions by `tokenize_pairs`. The prompt is not learnt."""
    for batch in in_batches(instructions):
        for prompt, response in tokenize_pairs(batch, tokenizer, start):
            yield prompt + response, [IGNORE_INDEX] * len(prompt) + response


def _tensor(values: "array[int]") -> Tensor:
    return torch.from_numpy(np.asarray(values))


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, TEXTS_AT_ONCE)):
        yield batch
