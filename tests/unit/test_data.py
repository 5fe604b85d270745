"""Samples, their order and who takes which part. Documents are packed and prompts masked, token by token."""

import itertools

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data import tokens
from loraprune_ds.train.data.samples import (
    SampleOrder,
    Samples,
    rank_micro_batches,
    seed_dropout,
    starts_of,
)
from tests.support.texts import BOS, EOS, make_tokenizer, numbers, words


def ragged(ids: list[list[int]], window: int, labels: list[list[int]] | None = None) -> Samples:
    rows = {"input_ids": ids, "labels": ids if labels is None else labels}
    columns = {
        name: torch.tensor([value for row in each for value in row]).int()
        for name, each in rows.items()
    }
    return Samples(columns, starts_of(torch.tensor([len(row) for row in ids])), window)


def test_ragged_rows_are_padded_to_the_longest_of_a_batch_in_steps_of_8() -> None:
    rows = ragged([list(range(1, 10)), [1, 2], [3]], window=16)
    assert len(rows) == 3
    inputs = rows.inputs(numbers(2, 1))
    assert inputs["input_ids"].tolist() == [[3] + [0] * 7, [1, 2] + [0] * 6]
    assert inputs["labels"].tolist() == [[3] + [-100] * 7, [1, 2] + [-100] * 6]
    assert rows.inputs(numbers(0))["input_ids"].shape == (1, 16)
    narrow = ragged([list(range(1, 10))], window=10)  # no multiple of 8, and never exceeded
    assert narrow.inputs(numbers(0, 0))["input_ids"].tolist() == [[*range(1, 10), 0]] * 2


def test_predictions_and_tokens_are_counted_without_padding_and_first_tokens() -> None:
    labels = [[-100, -100, 7, 8], [-100, 9], [4, 5, 6]]  # nothing predicts the 4
    samples = ragged([[5, 6, 7, 8], [5, 9], [4, 5, 6]], 16, labels)
    assert [samples.count_supervised(numbers(i)) for i in range(3)] == [2, 1, 2]
    assert samples.count_supervised(numbers(0, 1, 2, 0)) == 7
    assert samples.count_tokens(numbers(0, 1, 0)) == 10
    text = Samples.of_windows(torch.ones(3, 5, dtype=torch.int32))
    assert text.count_supervised(numbers(0, 2)) == 8
    assert text.count_tokens(numbers(0, 2)) == 10


def test_a_digest_sees_every_part_of_the_samples() -> None:
    ids, labels = [[1, 2, 3], [4]], [[-100, 2, 3], [4]]
    variants = [
        ragged(ids, 8, labels),
        ragged([[1, 2, 3], [5]], 8, labels),
        ragged(ids, 8, [[-100, -100, 3], [4]]),
        ragged([[1, 2], [3, 4]], 8, [[-100, 2], [3, 4]]),
        ragged(ids, 9, labels),
        Samples.of_windows(torch.arange(6).view(2, 3)),
        Samples.of_windows(torch.arange(6).view(3, 2)),
    ]
    digests = [samples.digest() for samples in variants]
    assert len(set(digests)) == len(variants)
    first = ragged(ids, 8, labels)
    assert (
        digests[0]
        == Samples(dict(reversed(first.columns.items())), first.starts, first.window).digest()
    )


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (12, 4), (7, 7), (3, 8), (1, 1)])
def test_every_epoch_is_a_permutation_and_steps_follow_on_without_a_gap(
    samples: int, batch: int
) -> None:
    order = SampleOrder(samples, batch, seed=1)
    epochs = 4
    stream = torch.cat([order.batch(step) for step in range(-(-epochs * samples // batch))])
    for epoch in stream[: epochs * samples].view(epochs, samples):
        assert sorted(epoch.tolist()) == list(range(samples))


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch_size() -> None:
    def stream(seed: int, batch: int) -> list[int]:
        order = SampleOrder(100, batch, seed)
        return torch.cat([order.batch(step) for step in range(200 // batch)]).tolist()

    assert stream(0, 10) == stream(0, 25)
    assert stream(0, 10) != stream(1, 10)
    assert stream(0, 10)[:100] != stream(0, 10)[100:]
    assert stream(1, 10)[:100] != stream(0, 10)[100:]  # nor on their sum


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_same_micro_batches_for_every_number_of_ranks(world_size: int) -> None:
    indices = torch.randperm(12)
    parts = [rank_micro_batches(indices, 2, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {6 // world_size}
    shared = [(number, micro.tolist()) for part in parts for number, micro in part]
    assert sorted(shared) == list(enumerate(indices.view(6, 2).tolist()))


def test_every_step_micro_batch_and_seed_draws_its_own_dropout() -> None:
    draws = set()
    for key in itertools.product((0, 1), (1, 2, 11), (0, 1, 11)):
        seed_dropout(*key)
        draws.add(tuple(torch.rand(4).tolist()))
    assert len(draws) == 2 * 3 * 3


# From texts to tokens, with tokenizers that add BOS, EOS, both or neither


def rows(samples: Samples) -> tuple[list[list[int]], list[list[int]]]:
    everything = numbers(*range(len(samples)))
    inputs = samples.inputs(everything)
    return inputs["input_ids"].tolist(), inputs["labels"].tolist()


PACKED = {
    "neither": ("$A", "</s>", [[11, 12, EOS, 13], [14, 15, EOS, 16], [17, 18, 19, 20]]),
    "BOS": (
        "<s> $A",
        "</s>",
        [[BOS, 11, 12, EOS], [BOS, 13, 14, 15], [EOS, BOS, 16, 17], [18, 19, 20, 21]],
    ),
    "EOS": ("$A </s>", "</s>", [[11, 12, EOS, 13], [14, 15, EOS, 16], [17, 18, 19, 20]]),
    "no EOS known": ("$A", None, [[11, 12, 13, 14], [15, 16, 17, 18]]),
}


@pytest.mark.parametrize(("template", "eos", "expected"), PACKED.values(), ids=PACKED.keys())
def test_documents_are_packed_with_eos_and_no_tail(
    template: str, eos: str | None, expected: list[list[int]]
) -> None:
    documents = [words(1, 2), "", words(3, 5), words(6, 11)]
    samples = tokens.pack_documents(
        documents, make_tokenizer(template=template, eos=eos), 4, None, None
    )
    ids, labels = rows(samples)
    assert ids[: len(expected)] == expected
    assert labels == ids
    lengths = {"$A": 2 + 3 + 6 + (2 if eos else 0), "<s> $A": 16, "$A </s>": 14}
    assert len(samples) == lengths[template] // 4


def test_every_window_can_begin_with_bos() -> None:
    """Nothing predicts the token whose place it takes."""
    tokenizer = make_tokenizer(template="<s> $A")
    samples = tokens.pack_documents([words(1, 2), words(3, 11)], tokenizer, 4, None, BOS)
    assert rows(samples)[0] == [[BOS, 11, 12, EOS], [BOS, 13, 14, 15], [BOS, 17, 18, 19]]


def test_max_samples_takes_the_first_windows_and_reads_no_further_than_it_must() -> None:
    read = []

    def documents():
        for i in range(3 * tokens.TEXTS_AT_ONCE):
            read.append(i)
            yield words(1, 3)

    whole = tokens.pack_documents(
        [words(1, 3)] * 3 * tokens.TEXTS_AT_ONCE, make_tokenizer(), 4, None, None
    )
    samples = tokens.pack_documents(documents(), make_tokenizer(), 4, 5, None)
    assert len(whole) == (4 * 3 * tokens.TEXTS_AT_ONCE - 1) // 4
    assert rows(samples)[0] == rows(whole)[0][:5]
    assert len(read) == tokens.TEXTS_AT_ONCE
    for too_little in ([words(1, 3)], []):
        assert len(tokens.pack_documents(too_little, make_tokenizer(), 4, 2, None)) == 0


def mask_prompts(
    pairs: list[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    window: int,
    max_samples: int | None = None,
) -> Samples:
    tokenized = tokens.tokenize_instructions(pairs, tokenizer)
    return tokens.collect_rows(tokenized, window, max_samples, itertools.repeat(""))


MASKED = {
    "neither": ("$A", "</s>", [11, 12], [13, 14, EOS]),
    "BOS": ("<s> $A", "</s>", [BOS, 11, 12], [13, 14, EOS]),
    "BOS and EOS": ("<s> $A </s>", "</s>", [BOS, 11, 12], [13, 14, EOS]),
    "no EOS known": ("<s> $A", None, [BOS, 11, 12], [13, 14]),
}


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "response"), MASKED.values(), ids=MASKED.keys()
)
def test_the_prompt_is_masked_and_the_response_ends_with_one_eos(
    template: str, eos: str | None, prompt: list[int], response: list[int]
) -> None:
    tokenizer = make_tokenizer(template=template, eos=eos)
    samples = mask_prompts([(words(1, 2), words(3, 4))], tokenizer, 8)
    padding = 8 - len(prompt + response)
    ids, labels = rows(samples)
    assert ids == [prompt + response + [0] * padding]
    assert labels == [[IGNORE_INDEX] * len(prompt) + response + [IGNORE_INDEX] * padding]
    assert samples.count_supervised(numbers(0)) == len(response)


def test_a_long_response_is_cut_at_the_window_and_a_sample_without_response_is_left_out() -> None:
    pairs = [
        (words(1, 6), words(7, 20)),  # cut: two tokens of the response are left
        (words(1, 8), words(9, 9)),  # the prompt fills the window
        (words(1, 20), words(21, 22)),
        (words(1, 2), ""),
        ("", words(1, 3)),  # no prompt at all: the first token is not predicted
        ("", "w1"),  # nor has it a second
        (words(1, 7), words(8, 8)),
    ]
    samples = mask_prompts(pairs, make_tokenizer(eos=None), 8)
    assert [samples.count_supervised(numbers(i)) for i in range(len(samples))] == [2, 2, 1]
    assert rows(samples)[0][0] == [11, 12, 13, 14, 15, 16, 17, 18]
    assert samples.left_out == 4
    # max_samples is of those kept
    assert len(mask_prompts(pairs[:1] + pairs[3:], make_tokenizer(eos=None), 8, 2)) == 2


def test_a_prompt_may_hold_braces_and_headings_and_its_mask_ends_where_the_response_begins() -> (
    None
):
    tokenizer = make_tokenizer()
    prompt = "Fill {prompt} and {0} ### Answer w1"
    example = tokens.make_instruction(prompt, "", "w5 ### Answer w6")
    assert prompt in example[0]
    assert tokens.make_instruction(prompt, "{input} w9", "w5")[0].count("{input} w9") == 1
    _, labels = rows(mask_prompts([example], tokenizer, 64))
    assert [label for label in labels[0] if label != IGNORE_INDEX] == [15, 0, 0, 16, EOS]
