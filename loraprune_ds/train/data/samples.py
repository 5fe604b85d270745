"""Holds the tuning samples of a run in memory, packs several into a window, and orders them.

The order depends only on the seed, the step and the micro-batch. Ranks agree without communication, and a run resumes
on any number of ranks.
"""

import hashlib
import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loraprune_ds.model.token_loss import IGNORE_INDEX

PADDING_ID = 0  # every model has this id, and no result depends on it
# after the end of a sample
PADDING = {"input_ids": PADDING_ID, "labels": IGNORE_INDEX, "position_ids": 0}
WIDTH_MULTIPLE = 8  # tensor cores need such widths for fast matrix products


@dataclass(frozen=True, eq=False)
class Samples:
    """Holds N samples of up to `window` tokens, end to end and without padding.

    The model needs no attention mask, because causal attention does not see the padding after a sample.
    """

    # (total,) integers each, by the model's names. `labels` are the ids, or IGNORE_INDEX at prompts. Models shift them.
    # `position_ids` exist if samples hold several texts, and begin at 0 in each.
    columns: dict[str, Tensor]
    starts: Tensor  # (N + 1,) int64; sample i is starts[i]:starts[i + 1] of each column
    window: int
    left_out: int = 0  # rows without a sample, because the window holds no part of their answer
    first_left_out: str = ""  # the place of that row

    @classmethod
    def of_windows(cls, input_ids: Tensor, labels: Tensor | None = None) -> "Samples":
        """Makes samples of (N, window) ids. Labels default to the ids."""
        count, window = input_ids.shape
        ids = input_ids.flatten()
        columns = {"input_ids": ids, "labels": ids if labels is None else labels.flatten()}
        return cls(columns, torch.arange(count + 1) * window, window)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns the model's inputs: each (len(indices), width) int64, padded on the right."""
        return {name: self._padded(name, indices) for name in self.columns}

    def attention_mask(self, indices: Tensor) -> Tensor | None:
        """Returns (len(indices), width) bool, False at padding. None if these samples have no padding."""
        inside = self._inside(indices)
        return None if bool(inside.all()) else inside

    def lengths(self) -> Tensor:
        """Returns the tokens of each sample, (N,) int64."""
        return self.starts.diff()

    def count_tokens(self, indices: Tensor) -> int:
        """Counts the tokens of these samples, without padding."""
        return int(self.lengths()[indices].sum())

    def count_supervised(self, indices: Tensor) -> int:
        """Counts the predictions of these samples that enter the loss."""
        return int((self._padded("labels", indices)[:, 1:] != IGNORE_INDEX).sum())

    def digest(self) -> str:
        """Returns the sha256 of all samples."""
        names = sorted(self.columns)
        digest = hashlib.sha256(repr((names, self.window)).encode())
        columns = [self.columns[name] for name in names]
        for tensor in (*columns, self.starts):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _inside(self, indices: Tensor) -> Tensor:
        """Returns (len(indices), width) bool, True at tokens. The longest sample decides the width."""
        lengths = self.starts[indices + 1] - self.starts[indices]
        width = math.ceil(int(lengths.max()) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        width = min(self.window, width)
        return torch.arange(width) < lengths[:, None]

    def _padded(self, name: str, indices: Tensor) -> Tensor:
        column = self.columns[name]
        inside = self._inside(indices)
        places = self.starts[indices, None] + torch.arange(inside.shape[1])
        values = column[places.clamp(max=len(column) - 1)]
        return values.long().where(inside, PADDING[name])


@dataclass(frozen=True, eq=False)
class LoadedData:
    """Holds the samples to tune on, and a held-out text for perplexity."""

    samples: Samples
    held_out: str
    # (n,) int64 sample numbers, by the weights of a mixture. None: each sample once
    epoch: Tensor | None = None

    def held_out_digest(self) -> str:
        return hashlib.sha256(self.held_out.encode()).hexdigest()

    @property
    def epoch_length(self) -> int:
        return len(self.samples if self.epoch is None else self.epoch)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Concatenates samples. If some have position ids, all get them."""
    if len(parts) == 1:
        return parts[0]
    if any("position_ids" in part.columns for part in parts):
        parts = [_with_positions(part) for part in parts]
    columns: dict[str, Tensor] = {}
    for name in parts[0].columns:
        columns[name] = torch.cat([part.columns[name] for part in parts])
    lengths = torch.cat([part.lengths() for part in parts])
    left_out = sum(part.left_out for part in parts)
    first_left_out = next((part.first_left_out for part in parts if part.left_out), "")
    return Samples(columns, starts_of(lengths), parts[0].window, left_out, first_left_out)


def _with_positions(samples: Samples) -> Samples:
    """Adds position ids, if they are missing. Each sample is then one text."""
    if "position_ids" in samples.columns:
        return samples
    positions = positions_of(samples.lengths())
    return replace(samples, columns={**samples.columns, "position_ids": positions})


def starts_of(lengths: Tensor) -> Tensor:
    """Returns the starts (N + 1,) of rows of these lengths (N,), end to end."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def positions_of(lengths: Tensor) -> Tensor:
    """Returns the position ids of rows of these lengths, each one text."""
    starts = starts_of(lengths)
    first = starts[:-1].repeat_interleave(lengths)  # of the row that a place belongs to
    return (torch.arange(int(starts[-1])) - first).int()


def pack_samples(samples: Samples) -> Samples:
    """Packs the samples into windows by best fit. Positions restart at 0, so attention does not cross samples.

    The first token of a sample is not learnt, because it follows the last token of another sample.
    """
    packs = best_fit(samples.lengths().tolist(), samples.window)
    order = torch.tensor([sample for pack in packs for sample in pack], dtype=torch.int64)
    lengths = samples.lengths()[order]
    starts = starts_of(lengths)  # of the samples in their new order
    positions = positions_of(lengths)
    places = samples.starts[order].repeat_interleave(lengths) + positions
    columns = {name: column[places] for name, column in samples.columns.items()}
    columns["labels"][starts[:-1]] = IGNORE_INDEX
    columns["position_ids"] = positions
    pack_sizes = torch.tensor(list(map(len, packs)), dtype=torch.int64)
    first_samples = starts_of(pack_sizes)
    return replace(samples, columns=columns, starts=starts[first_samples])


def best_fit(lengths: list[int], window: int) -> list[list[int]]:
    """Returns packs of sample numbers. Each goes into the fullest pack with room for it, the longest first."""
    packs: list[list[int]] = []
    open_packs: defaultdict[int, list[list[int]]] = defaultdict(list)  # by room
    rooms: list[int] = []  # of open packs, ascending
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        i = bisect_left(rooms, lengths[sample])
        if i == len(rooms):
            room = window
            pack: list[int] = []
            packs.append(pack)
        else:
            room = rooms[i]
            pack = open_packs[room].pop()
            if not open_packs[room]:
                rooms.pop(i)
        pack.append(sample)
        room -= lengths[sample]
        if not open_packs[room]:
            insort(rooms, room)
        open_packs[room].append(pack)
    return packs


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """Concatenates a permutation of the samples per epoch. Step s takes [s·G, (s+1)·G), G the global batch size."""

    num_samples: int  # of an epoch
    global_batch_size: int
    seed: int
    # (num_samples,) of an epoch, possibly repeated. None: each sample once
    numbers: Tensor | None = None
    # of all samples, to sort each batch by, longest first. None: a batch is not sorted
    lengths: Tensor | None = None

    def batch(self, step: int) -> Tensor:
        """Returns the (global_batch_size,) int64 sample numbers of a step, counted from 0."""
        first = step * self.global_batch_size
        epochs, places = np.divmod(
            np.arange(first, first + self.global_batch_size), self.num_samples
        )
        parts: list[np.ndarray[Any, Any]] = []
        for epoch in np.unique(epochs):
            permutation = _permutation(self.num_samples, self.seed, int(epoch))
            parts.append(permutation[places[epochs == epoch]])
        batch = torch.from_numpy(np.concatenate(parts))
        if self.numbers is not None:
            batch = self.numbers[batch]
        if self.lengths is not None:
            batch = batch[self.lengths[batch].argsort(descending=True, stable=True)]
        return batch


@lru_cache(maxsize=1)  # an epoch may have 10^9 samples
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def mix(counts: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Returns the sample numbers of the shortest epoch with all samples and with sources in these proportions.

    Source i has counts[i] samples, numbered after the earlier sources'.
    """
    shares = np.asarray(weights) / sum(weights)
    total = max(np.asarray(counts) / shares)
    first = 0
    parts: list[np.ndarray[Any, Any]] = []
    for count, share in zip(counts, shares, strict=True):
        parts.append(first + np.arange(round(total * share)) % count)
        first += count
    return torch.from_numpy(np.concatenate(parts))


def rank_micro_batches(
    indices: Tensor, micro_batch_size: int, rank: int, world_size: int
) -> list[tuple[int, Tensor]]:
    """Returns this rank's micro-batches of a global batch, each (micro_batch_size,), with their numbers.

    Micro-batch m goes to rank m mod world_size, so padding and dropout do not depend on the number of ranks.
    """
    micro_batches = enumerate(indices.view(-1, micro_batch_size))
    return list(micro_batches)[rank::world_size]


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch for the dropout of one micro-batch, by its number in the global batch."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
