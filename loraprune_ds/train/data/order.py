"""Decides which samples a step sees, which rank takes which of them, and which random numbers it draws.

Everything here depends only on the seed, the step and the micro-batch. So ranks agree without talking, and a resumed
run goes on where it stopped, on any number of ranks.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loraprune_ds.pruning.schedule import steps_for_epochs


class BatchOrder(Protocol):
    """Tells which samples a step sees."""

    def batch(self, step: int) -> Tensor: ...


class SampleOrder:
    """Puts the samples into the order in which steps see them.

    The permutations of all epochs follow one another. Step s takes the samples [s·G, (s+1)·G) of them, where G is the
    global batch size. The permutation of an epoch depends only on the seed and the epoch.

    Args:
        num_samples: of an epoch.
        numbers: (num_samples,) the sample numbers of an epoch, in which some may stand more than once. None: each once.
        lengths: of all samples. A batch then begins with its longest. None: a batch is not sorted.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        numbers: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        self.num_samples = num_samples
        self._numbers, self._lengths = numbers, lengths
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Tensor:
        """Returns the (global_batch_size,) int64 sample numbers of a step, counted from 0. A batch may cross epochs."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs = positions // self.num_samples
        parts = [
            self._permutation_of(int(epoch))[positions[epochs == epoch] % self.num_samples]
            for epoch in np.unique(epochs)
        ]
        batch = torch.from_numpy(np.concatenate(parts))
        if self._numbers is not None:
            batch = self._numbers[batch]
        return batch if self._lengths is None else batch[self._lengths[batch].argsort(descending=True, stable=True)]

    def steps_for_epochs(self, epochs: float) -> int:
        """Returns the whole steps that fit into so many epochs, at least one."""
        return steps_for_epochs(epochs, self.num_samples, self.global_batch_size)

    def _permutation_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self.num_samples)
        return self._permutation


def mix(counts: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Returns the sample numbers of an epoch in which sources have these weights.

    Source i has counts[i] samples, numbered behind those of the sources before it. An epoch is as short as it can be
    with all samples in it. So one source is there once, and the others are repeated.
    """
    share = np.asarray(weights) / sum(weights)
    total = max(np.asarray(counts) / share)
    firsts = np.cumsum([0, *counts[:-1]])
    parts = [
        first + np.arange(round(total * part)) % count for first, count, part in zip(firsts, counts, share, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def rank_micro_batches(indices: Tensor, micro_batch_size: int, rank: int, world_size: int) -> list[tuple[int, Tensor]]:
    """Returns this rank's part of a global batch: micro-batches of (micro_batch_size,) sample numbers, numbered.

    Micro-batch m of the global batch goes to rank m mod world_size. So the micro-batches, and with them padding and
    dropout, are the same for every number of ranks.
    """
    return list(enumerate(indices.view(-1, micro_batch_size)))[rank::world_size]


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch for the dropout of one micro-batch, so that all steps and micro-batches draw other masks.

    The seed is set where it is used. A run that goes on later has no state of random numbers to restore.

    Args:
        micro_batch: its number in the global batch, so that its rank does not matter.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
