"""Samples in memory, the order of steps, who takes which part, and what dropout draws: all without another rank."""

import itertools

import pytest
import torch
from torch import Tensor

from loraprune_ds.train.data.samples import SampleOrder, Samples, rank_micro_batches, seed_dropout, starts_of


def ragged(ids: list[list[int]], window: int, labels: list[list[int]] | None = None) -> Samples:
    rows = {"input_ids": ids, "labels": ids if labels is None else labels}
    columns = {name: torch.tensor([value for row in each for value in row]).int() for name, each in rows.items()}
    return Samples(columns, starts_of(torch.tensor([len(row) for row in ids])), window)


def numbers(*indices: int) -> Tensor:
    return torch.tensor(indices)


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
    assert samples.text_lengths(numbers(0, 1, 0)) == [4, 2, 4]
    text = Samples.of_windows(torch.ones(3, 5, dtype=torch.int32))
    assert text.count_supervised(numbers(0, 2)) == 8
    assert text.text_lengths(numbers(0, 2)) == [5, 5]


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
    assert digests[0] == Samples(dict(reversed(first.columns.items())), first.starts, first.window).digest()


@pytest.mark.parametrize(("samples", "batch"), [(10, 4), (12, 4), (7, 7), (3, 8), (1, 1)])
def test_every_epoch_is_a_permutation_and_steps_follow_on_without_a_gap(samples: int, batch: int) -> None:
    order = SampleOrder(samples, batch, seed=1)
    epochs = 4
    stream = torch.cat([order.batch(step) for step in range(-(-epochs * samples // batch))])
    for epoch in stream[: epochs * samples].view(epochs, samples):
        assert sorted(epoch.tolist()) == list(range(samples))


def test_a_step_can_be_looked_up_in_any_order() -> None:
    forward, backward = (SampleOrder(10, 4, seed=3) for _ in range(2))
    batches = [forward.batch(step) for step in range(20)]
    assert all(torch.equal(backward.batch(step), batches[step]) for step in reversed(range(20)))


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


def test_a_micro_batch_draws_the_same_dropout_on_every_number_of_ranks() -> None:
    def drawn(world_size: int) -> dict[int, list[float]]:
        """Returns what the ranks draw in a step, by the first sample of the micro-batch."""
        found = {}
        for rank in range(world_size):
            for number, micro in rank_micro_batches(torch.arange(12), 2, rank, world_size):
                seed_dropout(3, 5, number)
                found[int(micro[0])] = torch.rand(4).tolist()
        return found

    assert drawn(1) == drawn(2) == drawn(3) == drawn(6)
    assert len(drawn(1)) == 6
