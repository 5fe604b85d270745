"""Holds the tuning samples of a run in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.model.token_loss import IGNORE_INDEX

PADDING_ID = 0  # every model knows this id, and nothing looks at it
PADDING = {"input_ids": PADDING_ID, "labels": IGNORE_INDEX, "position_ids": 0}  # behind the end of a row
WIDTH_MULTIPLE = 8  # matrix products are fastest at widths that tensor cores divide


@dataclass(frozen=True, eq=False)
class Ragged:
    """Holds rows of unequal length end to end, so that millions of short instructions take no room for padding.

    It is read like a matrix (N, window) by row numbers: `ragged[indices]` is (len(indices), width) int32. The rows are
    padded on the right to the longest of them. The width is rounded up to a multiple of 8, but never above `window`.

    Attributes:
        values: (total,) int32.
        starts: (N + 1,) int64; row i is values[starts[i]:starts[i + 1]], of at most `window` values.
        padding: the value behind the end of a row.
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
        rows = self.rows(indices)
        longest = max(len(row) for row in rows)
        width = min(self.window, -(-longest // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
        padded = torch.full((len(rows), width), self.padding, dtype=self.values.dtype)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded

    def rows(self, indices: Tensor) -> list[Tensor]:
        """Returns these rows, without padding."""
        bounds = zip(self.starts[indices].tolist(), self.starts[indices + 1].tolist(), strict=True)
        return [self.values[start:end] for start, end in bounds]

    def lengths(self, indices: Tensor) -> Tensor:
        """Returns (len(indices),) int64: the values of each row, without padding."""
        return self.starts[indices + 1] - self.starts[indices]


@dataclass(frozen=True, eq=False)
class Samples:
    """Holds N samples of up to `window` tokens.

    The model needs no attention mask for the padding. It stands behind the tokens of a sample, where causal attention
    cannot see it, and no label asks for it.

    Attributes:
        input_ids: (N, window) int32 or int64, by row numbers.
        labels: the same shape. They are the ids themselves, and IGNORE_INDEX at prompts and padding. Models shift them.
        left_out: rows that became no samples, because nothing of their answer lies within the window.
        position_ids: of samples that hold several texts. Each begins at 0 there. None: all hold one.
    """

    input_ids: Tensor | Ragged
    labels: Tensor | Ragged
    left_out: int = 0
    position_ids: Ragged | None = None

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor], *, window: int, left_out: int) -> "Samples":
        """Makes samples of what `tensors` gives."""
        starts = tensors.get("starts")
        if starts is None:
            return cls(tensors["input_ids"], tensors["input_ids"], left_out)
        rows = {name: Ragged(tensors[name], starts, window, PADDING[name]) for name in PADDING if name in tensors}
        return cls(**rows, left_out=left_out)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that hold the samples."""
        if not isinstance(self.input_ids, Ragged):
            return {"input_ids": self.input_ids}
        return {name: rows.values for name, rows in self.rows().items()} | {"starts": self.input_ids.starts}

    def rows(self) -> dict[str, Any]:
        """Returns what the model gets of samples, by its name there: each Ragged, or a matrix."""
        return {name: getattr(self, name) for name in PADDING if getattr(self, name) is not None}

    def inputs(self, indices: Tensor) -> dict[str, Tensor]:
        """Returns what the model gets of these samples: each (len(indices), width) int64."""
        return {name: rows[indices].long() for name, rows in self.rows().items()}

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def window(self) -> int:
        return self.input_ids.shape[1]

    def text_lengths(self, indices: Tensor) -> list[int]:
        """Counts the tokens of each text in these samples. Attention does not leave a text."""
        if not isinstance(self.input_ids, Ragged):
            return [self.window] * len(indices)
        if self.position_ids is None:
            return self.input_ids.lengths(indices).tolist()
        ends = torch.cat([row.roll(-1) == 0 for row in self.position_ids.rows(indices)])  # where the next one begins
        return ends.nonzero()[:, 0].diff(prepend=torch.tensor([-1])).tolist()

    def count_supervised(self, indices: Tensor) -> int:
        """Counts the predictions of these samples that enter the loss.

        It is the denominator of a step's loss. Each rank knows it without asking the others.
        """
        return int((self.labels[indices][:, 1:] != IGNORE_INDEX).sum())

    def supervised_counts(self) -> Tensor:
        """Returns (N,) int64: the predictions of each sample that enter the loss."""
        if not isinstance(self.labels, Ragged):
            return (self.labels[:, 1:] != IGNORE_INDEX).sum(1)
        starts = self.labels.starts
        before = torch.zeros(len(self.labels.values) + 1, dtype=torch.int64)
        before[1:] = (self.labels.values != IGNORE_INDEX).cumsum(0)
        return before[starts[1:]] - before[torch.minimum(starts[:-1] + 1, starts[1:])]

    def lengths(self) -> Tensor:
        """Returns (N,) int64: the tokens of each sample."""
        if isinstance(self.input_ids, Ragged):
            return self.input_ids.starts.diff()
        return torch.full((len(self),), self.window)

    def attention_mask(self, indices: Tensor) -> Tensor | None:
        """Returns (len(indices), width) bool, False at padding. None if these samples have no padding."""
        if not isinstance(self.input_ids, Ragged):
            return None
        lengths = self.input_ids.lengths(indices)
        width = self.input_ids[indices].shape[1]
        return None if bool((lengths == width).all()) else torch.arange(width) < lengths[:, None]

    def largest_id(self) -> int:
        """Returns the largest token id of all samples."""
        ids = self.input_ids.values if isinstance(self.input_ids, Ragged) else self.input_ids
        return int(ids.max())

    def digest(self) -> str:
        """Returns the sha256 of all samples, for ranks to compare."""
        digest = hashlib.sha256()
        for part in self.rows().values():
            digest.update(repr(tuple(part.shape)).encode())
            for tensor in (part.values, part.starts) if isinstance(part, Ragged) else (part,):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


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
    """Puts samples one behind the other. Windows of text become rows among others."""
    if len(parts) == 1:
        return parts[0]
    tensors = [_row_tensors(part) for part in parts]
    names = {name for each in tensors for name in each} - {"starts"}
    joined = {
        name: torch.cat([each[name] if name in each else _positions(each["starts"]) for each in tensors])
        for name in names
    }
    joined["starts"] = starts_of(torch.cat([each["starts"].diff() for each in tensors]))
    return Samples.of_tensors(joined, window=parts[0].window, left_out=sum(part.left_out for part in parts))


def starts_of(lengths: Tensor) -> Tensor:
    """Returns the starts (N + 1,) of rows of these lengths (N,) that lie end to end."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _positions(starts: Tensor) -> Tensor:
    """Returns the position ids of rows that hold one text each."""
    return (torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(starts.diff())).int()


def _row_tensors(samples: Samples) -> dict[str, Tensor]:
    if isinstance(samples.input_ids, Ragged):
        return samples.tensors()
    ids = samples.input_ids.flatten()
    return {"input_ids": ids, "labels": ids, "starts": torch.arange(len(samples) + 1) * samples.window}
