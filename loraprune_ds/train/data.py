"""The tuning samples of a run, in which order steps see them, and which part of a step is whose.

Everything here is a pure function of the text, the seed and the step, so ranks agree without talking, and a resumed run
goes on where it stopped.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORE_INDEX = -100  # what torch's cross_entropy skips
PADDING_ID = 0  # any id would do: see Samples.batch
WIDTH_MULTIPLE = 8  # matrix products are fastest at widths that tensor cores divide


@dataclass(frozen=True, eq=False)
class Samples:
    """N samples end to end, unpadded: millions of short instructions cost what their tokens cost.

    Attributes:
        tokens: (total,) int32, all samples' ids.
        starts: (N + 1,) int64; sample i is tokens[starts[i]:starts[i + 1]], of 2 to `window` tokens.
        prompt_lengths: (N,) int32; that many first tokens of a sample are not predicted. 0: all text counts.
        window: the longest a sample may be.
    """

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int32]
    window: int

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def supervised(self) -> npt.NDArray[np.int64]:
        """(N,): predictions in each sample that count; there is none for a first token."""
        return np.diff(self.starts) - np.maximum(self.prompt_lengths, 1)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Samples padded on the right to the longest of them: input_ids and labels, both (batch, width) int64.

        Labels are the ids themselves, IGNORE_INDEX at prompts and padding (models shift them). Padding needs no
        attention mask: it comes after every real token, where causal attention cannot see it. The width is rounded up
        to a multiple of 8, but never above `window`.

        Args:
            indices: (batch,) sample numbers.
        """
        chosen = [torch.from_numpy(self.tokens[self.starts[i] : self.starts[i + 1]]) for i in indices.tolist()]
        longest = max(len(sample) for sample in chosen)
        width = min(self.window, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        input_ids = torch.full((len(chosen), width), PADDING_ID, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, (sample, prompt) in enumerate(zip(chosen, self.prompt_lengths[indices.numpy()], strict=True)):
            input_ids[row, : len(sample)] = sample
            labels[row, prompt : len(sample)] = sample[prompt:]
        return input_ids, labels

    def digest(self) -> str:
        """sha256 of all samples, for ranks to compare."""
        digest = hashlib.sha256(str(self.window).encode())
        for part in (self.tokens, self.starts, self.prompt_lengths):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def supervised_tokens(samples: Samples, indices: Tensor) -> int:
    """How many predictions of these samples count: a step's denominator, which each rank knows without asking."""
    return int(samples.supervised[indices.numpy()].sum())


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
        steps = epochs * self.num_samples / self.global_batch_size
        return max(1, math.floor(steps + 1e-9))  # 0.29 epochs of 100 samples are 29, not 28.999...

    def _permutation_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed % 2**64, epoch])  # a seed may be negative, here not
            self._epoch, self._permutation = epoch, generator.permutation(self.num_samples)
        return self._permutation


def rank_micro_batches(indices: Tensor, micro_batch_size: int, rank: int, world_size: int) -> list[Tensor]:
    """This rank's part of a global batch: G / (micro · W) micro-batches of (micro,) sample numbers.

    Micro-batch m of the global batch is rank m mod W's, so micro-batches, and with them padding, are the same for every
    number of ranks.
    """
    return list(indices.view(-1, micro_batch_size)[rank::world_size])
