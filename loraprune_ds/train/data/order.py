"""Decides which samples a step sees, which rank gets which of them, and which random numbers it draws.

Everything depends only on the seed, the step and the micro-batch: ranks agree without communication, and a run resumes
on any number of ranks.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BatchOrder(Protocol):
    def batch(self, step: int) -> Tensor: ...


class SampleOrder:
    """Concatenates a permutation of the samples per epoch. Step s takes [s·G, (s+1)·G) of it, G the global batch size.

    Args:
        num_samples: of an epoch.
        numbers: (num_samples,) the sample numbers of an epoch, possibly repeated. None: each sample once.
        lengths: of all samples, to sort each batch by, longest first. None: a batch is not sorted.
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
        """Returns the (global_batch_size,) int64 sample numbers of a step, counted from 0."""
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

    def _permutation_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self.num_samples)
        return self._permutation


def mix(counts: Sequence[int], weights: Sequence[float]) -> Tensor:
    """Returns the sample numbers of the shortest epoch that contains all samples and has sources in these proportions.

    Source i has counts[i] samples, numbered after the earlier sources'.
    """
    share = np.asarray(weights) / sum(weights)
    total = max(np.asarray(counts) / share)
    firsts = np.cumsum([0, *counts[:-1]])
    parts = [
        first + np.arange(round(total * part)) % count for first, count, part in zip(firsts, counts, share, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def rank_micro_batches(indices: Tensor, micro_batch_size: int, rank: int, world_size: int) -> list[tuple[int, Tensor]]:
    """Returns this rank's micro-batches of a global batch, each (micro_batch_size,), with their numbers.

    Micro-batch m goes to rank m mod world_size, so padding and dropout do not depend on the number of ranks.
    """
    return list(enumerate(indices.view(-1, micro_batch_size)))[rank::world_size]


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch for the dropout of one micro-batch, by its number in the global batch."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
