"""The tuning samples of a run, in which order steps see them, and which part of a step is whose.

Everything here is a pure function of the text, the seed and the step, so ranks agree without talking, and a resumed run
goes on where it stopped.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.pruning.schedule import steps_for_epochs

WIDTH_MULTIPLE = 8  # matrix products are fastest at widths that tensor cores divide


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of unequal length end to end: millions of short instructions cost what their tokens cost.

    Read like a matrix (N, window) by row numbers: `ragged[indices]` is (len(indices), width) int32, padded on the right
    to the longest of these rows, rounded up to a multiple of 8 but never above `window`.

    Attributes:
        values: (total,) int32.
        starts: (N + 1,) int64; row i is values[starts[i]:starts[i + 1]], of at most `window` values.
        padding: the value that stands after the end of a row.
    """

    values: Tensor
    starts: Tensor
    window: int
    padding: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.starts) - 1, self.window

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        bounds = zip(self.starts[indices].tolist(), self.starts[indices + 1].tolist(), strict=True)
        rows = [self.values[start:end] for start, end in bounds]
        longest = max(len(row) for row in rows)
        width = min(self.window, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        padded = torch.full((len(rows), width), self.padding, dtype=self.values.dtype)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples of up to `window` tokens.

    Padding needs no attention mask: it comes after every real token, where causal attention cannot see it, and no label
    asks for it.

    Attributes:
        input_ids: (N, window) int32 or int64, by row numbers.
        labels: the same shape; the ids themselves, IGNORE_INDEX at prompts and padding (models shift them).
        left_out: instructions that are no samples, since nothing of their response lies within the window.
    """

    input_ids: Tensor | Ragged
    labels: Tensor | Ragged
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def count_tokens(self, indices: Tensor) -> int:
        """Real tokens of these samples, padding not counted."""
        if isinstance(self.input_ids, Ragged):
            starts = self.input_ids.starts
            return int((starts[indices + 1] - starts[indices]).sum())
        return len(indices) * self.input_ids.shape[1]

    def attention_mask(self, indices: Tensor) -> Tensor | None:
        """(len(indices), width) bool, False at padding; None if these samples have none."""
        if not isinstance(self.input_ids, Ragged):
            return None
        starts = self.input_ids.starts
        lengths = starts[indices + 1] - starts[indices]
        width = self.input_ids[indices].shape[1]
        return None if bool((lengths == width).all()) else torch.arange(width) < lengths[:, None]

    def supervised_counts(self) -> Tensor:
        """(N,) int64: predictions of each sample that count."""
        if not isinstance(self.labels, Ragged):
            return (self.labels[:, 1:] != IGNORE_INDEX).sum(1)
        starts = self.labels.starts
        before = torch.zeros(len(self.labels.values) + 1, dtype=torch.int64)
        before[1:] = (self.labels.values != IGNORE_INDEX).cumsum(0)
        return before[starts[1:]] - before[torch.minimum(starts[:-1] + 1, starts[1:])]

    def largest_id(self) -> int:
        ids = self.input_ids.values if isinstance(self.input_ids, Ragged) else self.input_ids
        return int(ids.max())

    def digest(self) -> str:
        """sha256 of all samples, for ranks to compare."""
        digest = hashlib.sha256()
        for part in (self.input_ids, self.labels):
            digest.update(repr(tuple(part.shape)).encode())
            for tensor in (part.values, part.starts) if isinstance(part, Ragged) else (part,):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def supervised_tokens(samples: Samples, indices: Tensor) -> int:
    """How many predictions of these samples count: a step's denominator, which each rank knows without asking."""
    return int((samples.labels[indices][:, 1:] != IGNORE_INDEX).sum())


class SampleOrder:
    """Step s uses samples [s·G, (s+1)·G) of the permutations of all epochs, one after another.

    The permutation of an epoch depends on seed and epoch only.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int) -> None:
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def batch(self, step: int) -> Tensor:
        """(global_batch_size,) int64 sample numbers of step `step`, from 0. A batch may cross epochs."""
        positions = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs = positions // self.num_samples
        parts = [
            self._permutation_of(int(epoch))[positions[epochs == epoch] % self.num_samples]
            for epoch in np.unique(epochs)
        ]
        return torch.from_numpy(np.concatenate(parts))

    def steps_for_epochs(self, epochs: float) -> int:
        """Whole steps in so many epochs, at least one."""
        return steps_for_epochs(epochs, self.num_samples, self.global_batch_size)

    def _permutation_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self.num_samples)
        return self._permutation


def rank_micro_batches(indices: Tensor, micro_batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """This rank's part of a global batch: G / (micro · W) micro-batches of (micro,) sample numbers.

    Micro-batch m of the global batch is rank m mod W's, so micro-batches, and with them padding, are the same for every
    number of ranks.
    """
    return list(indices.view(-1, micro_batch_size)[rank::world_size])
