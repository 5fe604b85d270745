"""Holds the tuning samples of a run in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.model.token_loss import IGNORE_INDEX

PADDING_ID = 0  # every model knows this id, and nothing looks at it
PADDING = {"input_ids": PADDING_ID, "labels": IGNORE_INDEX, "position_ids": 0}  # behind the end of a sample
WIDTH_MULTIPLE = 8  # matrix products are fastest at widths that tensor cores divide


@dataclass(frozen=True, eq=False)
class Samples:
    """Holds N samples of up to `window` tokens, end to end. So short ones take no room for padding.

    The model needs no attention mask for the padding. It stands behind the tokens of a sample, where causal attention
    cannot see it, and no label asks for it.

    Attributes:
        columns: (total,) integers each, by the name that the model has for them. `labels` are the ids, and IGNORE_INDEX
            at prompts. Models shift them. `position_ids` are there if samples hold several texts. Each begins at 0.
        starts: (N + 1,) int64. Sample i is starts[i]:starts[i + 1] of each column.
        left_out: rows that became no samples, because nothing of their answer lies within the window.
    """

    columns: dict[str, Tensor]
    starts: Tensor
    window: int
    left_out: int = 0

    @classmethod
    def of_windows(cls, input_ids: Tensor, labels: Tensor | None = None) -> "Samples":
        """Makes samples of (N, window) ids without padding. Labels are the ids if they are not given."""
        count, window = input_ids.shape
        ids = input_ids.flatten()
        columns = {"input_ids": ids, "labels": ids if labels is None else labels.flatten()}
        return cls(columns, torch.arange(count + 1) * window, window)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns what the model gets of these samples: each (len(indices), width) int64.

        They are padded on the right to the longest of them. The width is rounded up to a multiple of 8, but never above
        `window`.
        """
        return {name: self._padded(name, indices) for name in self.columns}

    def attention_mask(self, indices: Tensor) -> Tensor | None:
        """Returns (len(indices), width) bool, False at padding. None if these samples have no padding."""
        inside = self._inside(indices)
        return None if bool(inside.all()) else inside

    def lengths(self) -> Tensor:
        """Returns (N,) int64: the tokens of each sample."""
        return self.starts.diff()

    def text_lengths(self, indices: Tensor) -> list[int]:
        """Counts the tokens of each text in these samples. Attention does not leave a text."""
        inside = self._inside(indices)
        if "position_ids" not in self.columns:
            return inside.sum(1).tolist()
        begins = (self._padded("position_ids", indices)[inside] == 0).nonzero()[:, 0]
        return begins.diff(append=inside.sum()[None]).tolist()

    def count_supervised(self, indices: Tensor) -> int:
        """Counts the predictions of these samples that enter the loss.

        It is the denominator of a step's loss. Each rank knows it without asking the others.
        """
        return int((self._padded("labels", indices)[:, 1:] != IGNORE_INDEX).sum())

    def supervised_counts(self) -> Tensor:
        """Returns (N,) int64: the predictions of each sample that enter the loss."""
        before = starts_of(self.columns["labels"] != IGNORE_INDEX)
        return before[self.starts[1:]] - before[torch.minimum(self.starts[:-1] + 1, self.starts[1:])]

    def largest_id(self) -> int:
        """Returns the largest token id of all samples."""
        return int(self.columns["input_ids"].max())

    def digest(self) -> str:
        """Returns the sha256 of all samples, for ranks to compare."""
        digest = hashlib.sha256(repr((sorted(self.columns), self.window)).encode())
        for tensor in (*(self.columns[name] for name in sorted(self.columns)), self.starts):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def _inside(self, indices: Tensor) -> Tensor:
        lengths = self.starts[indices + 1] - self.starts[indices]
        width = min(self.window, -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        return torch.arange(width) < lengths[:, None]

    def _padded(self, name: str, indices: Tensor) -> Tensor:
        column, inside = self.columns[name], self._inside(indices)
        places = self.starts[indices, None] + torch.arange(inside.shape[1])
        return column[places.clamp(max=len(column) - 1)].long().where(inside, PADDING[name])


@dataclass(frozen=True, eq=False)
class LoadedData:
    """Holds the samples to tune on, and a text for perplexity that tuning never sees.

    Attributes:
        epoch: (n,) int64 sample numbers of an epoch, by the weights of a mixture. None: each sample once.
    """

    samples: Samples
    held_out: str
    epoch: Tensor | None = None

    @property
    def epoch_length(self) -> int:
        return len(self.samples if self.epoch is None else self.epoch)


def join_samples(parts: Sequence[Samples]) -> Samples:
    """Puts samples one behind the other. Beside packs, samples of one text get position ids, too."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name in PADDING if any(name in part.columns for part in parts)]
    columns = {
        name: torch.cat(
            [part.columns[name] if name in part.columns else positions_of(part.lengths()) for part in parts]
        )
        for name in names
    }
    starts = starts_of(torch.cat([part.lengths() for part in parts]))
    return Samples(columns, starts, parts[0].window, sum(part.left_out for part in parts))


def starts_of(lengths: Tensor) -> Tensor:
    """Returns the starts (N + 1,) of rows of these lengths (N,) that lie end to end."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def positions_of(lengths: Tensor) -> Tensor:
    """Returns the position ids of rows of these lengths that hold one text each."""
    starts = starts_of(lengths)
    return (torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)).int()
