"""The forms in which a rank holds the frozen weight of a linear: as it is, or as int8 with scales.

int8 has a scale for each block of BLOCK neighbours along the hidden axis, the one that no cut makes smaller. The last
block may be short. A row (or column) that leaves takes whole blocks with it. So does an expert, whose weight has blocks
of its own. So to cut and then quantise is to quantise and then cut, bit by bit. Scales are cut along with the weights.

A form is all that the rest of the package needs to know. It names the tensors that hold a weight, makes them of the
weight and the weight of them, and reads any flat part of them from the weight on disk.
"""

# torch does not type all of its methods.
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

WEIGHT, SCALE = "weight", "weight_scale"
BLOCK = 64  # weights under one scale. 32 gave no lower perplexity (tests/benchmarks/README.md)
LARGEST = 127
READ_CHUNK = 1 << 24  # elements converted at a time, so that reading needs little beyond the shard itself

Matrix = tuple[int, int]
Rows = TypeVar("Rows", int, Tensor)
ReadPart = Callable[[int, int], Tensor]  # (start, end) -> the flat elements [start, end) of a weight, fp32


class NotFinite(ValueError):
    """Tells that a weight has an inf or NaN, which int8 cannot hold."""


class Held(NamedTuple):
    """Describes a tensor that ZeRO-3 shards."""

    shape: tuple[int, ...]
    element_size: int


@dataclass(frozen=True)
class Dense:
    """The weight as it is.

    Attributes:
        tensors: the names of those that hold it.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT,)

    def held(self, shape: Matrix, element_size: int) -> dict[str, Held]:
        """Returns the tensors that hold a weight of `shape`. `element_size` is that of the model's dtype."""
        return {WEIGHT: Held(shape, element_size)}

    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Makes these tensors of a weight."""
        return {WEIGHT: weight.to(dtype)}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Makes the weight of these tensors."""
        return tensors[WEIGHT]

    def kept(self, axis: int, kept: Tensor) -> dict[str, Tensor]:
        """Returns the rows (or columns) that stay of each tensor, if these stay of the weight."""
        return {WEIGHT: kept}


@dataclass(frozen=True)
class Int8:
    """int8 weights with scales in the model's dtype: W = weight * weight_scale, rounded to that dtype.

    Rows come in bands that share no scale: a row each (axis 0), or up to BLOCK rows (axis 1). A band of the weight
    belongs to one row of scales. So a flat part of either is read from whole rows of the weight.

    Attributes:
        axis: the one without blocks.
        rows: of a matrix, if several lie one below the other and have blocks along these rows.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, SCALE)
    axis: int
    rows: int | None = None

    @property
    def hidden(self) -> int:
        """The axis that has the blocks."""
        return 1 - self.axis

    @property
    def band(self) -> int:
        """The most rows of a weight that belong to one row of scales."""
        return 1 if self.axis == 0 else BLOCK

    def band_of(self, row: Rows) -> Rows:
        """Returns the row of scales that a row of the weight, or each of several, belongs to."""
        if self.rows is None:
            return row // self.band
        return row // self.rows * self._bands + row % self.rows // self.band

    def _top(self, band: int) -> int:
        """Returns the first row of a band."""
        if self.rows is None:
            return band * self.band
        return band // self._bands * self.rows + band % self._bands * self.band

    @property
    def _bands(self) -> int:
        """The bands of each of several matrices."""
        assert self.rows is not None
        return -(-self.rows // self.band)

    def scale_shape(self, shape: Matrix) -> Matrix:
        """Returns the shape of the scales of a weight."""
        if self.axis == 0:
            return shape[0], -(-shape[1] // BLOCK)
        return self.band_of(shape[0] - 1) + 1, shape[1]

    def held(self, shape: Matrix, element_size: int) -> dict[str, Held]:
        """As `Dense.held`."""
        return {WEIGHT: Held(shape, 1), SCALE: Held(self.scale_shape(shape), element_size)}

    @torch.no_grad()
    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """As `Dense.split`. Only some rows are in fp32 at a time.

        Raises:
            NotFinite: the weight has an inf or NaN.
        """
        rows = self.band * max(1, READ_CHUNK // (self.band * weight.shape[1]))
        matrices = weight.split(self.rows or len(weight))
        parts = [self._quantise(part.float(), dtype) for matrix in matrices for part in matrix.split(rows)]
        return {WEIGHT: torch.cat([q for q, _ in parts]), SCALE: torch.cat([scale for _, scale in parts])}

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `Dense.join`."""
        weight, scale = tensors[WEIGHT], tensors[SCALE]
        if self.rows in (None, len(weight)):
            return dequantise(weight, scale, self.axis)
        matrices = zip(weight.split(self.rows), scale.split(self._bands), strict=True)
        return torch.cat([dequantise(*matrix, self.axis) for matrix in matrices])

    def kept(self, axis: int, kept: Tensor) -> dict[str, Tensor]:
        """As `Dense.kept`. Of several matrices whole ones leave."""
        return {WEIGHT: kept, SCALE: kept if axis == self.axis else self.band_of(kept).unique()}

    def read(self, name: str, shape: Matrix, start: int, end: int, read: ReadPart, dtype: torch.dtype) -> Tensor:
        """Returns the flat elements [start, end) of one of the tensors that hold a weight of `shape`.

        Args:
            name: WEIGHT or SCALE.
            read: of the weight. It is asked for whole bands.

        Raises:
            NotFinite: what was read has an inf or NaN.
        """
        rows, columns = shape
        bands, width = self.bands(shape, start, end), columns
        if name == SCALE:
            width = self.scale_shape(shape)[1]
            bands = range(start // width, -(-end // width))
        found = torch.empty(end - start, dtype=torch.int8 if name == WEIGHT else dtype)
        for first, last in self._at_once(bands, max(1, READ_CHUNK // (self.band * columns))):
            top, bottom = self._top(first), min(self._top(last), rows)
            part = read(top * columns, bottom * columns).view(-1, columns)
            values = dict(zip(self.tensors, self._quantise(part, dtype), strict=True))[name].reshape(-1)
            origin = (top if name == WEIGHT else first) * width
            low, high = max(start, origin), min(end, origin + len(values))
            found[low - start : high - start] = values[low - origin : high - origin]
        return found

    def _at_once(self, bands: range, count: int) -> Iterator[tuple[int, int]]:
        """Splits bands into ranges of up to `count` of the same matrix."""
        first = bands.start
        while first < bands.stop:
            end = bands.stop if self.rows is None else (first // self._bands + 1) * self._bands
            last = min(first + count, bands.stop, end)
            yield first, last
            first = last

    def bands(self, shape: Matrix, start: int, end: int) -> range:
        """Returns the rows of scales that the elements [start, end) of a weight need."""
        first = self.band_of(start // shape[1])
        return range(first, self.band_of((end - 1) // shape[1]) + 1 if end > start else first)

    def decode(self, rows: Tensor, first: int, scales: Tensor, first_band: int) -> Tensor:
        """Returns some rows of the weight, in the dtype of the scales.

        Args:
            rows: (rows, columns) int8. They begin with row `first` of the weight.
            scales: rows of scales. They begin with row `first_band` of all.
        """
        bands = self.band_of(torch.arange(first, first + len(rows), device=rows.device))
        scales = scales.index_select(0, bands - first_band)
        return dequantise(rows, scales, 0) if self.axis == 0 else rows.to(scales.dtype).mul_(scales)

    def _quantise(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Quantises whole bands in fp32."""
        largest = torch.cat([part.abs().amax(self.hidden + 1) for part in _blocks(weight, self.hidden)], self.hidden)
        if not torch.isfinite(largest).all():
            raise NotFinite
        limits = torch.finfo(dtype)
        scale = (largest / LARGEST).to(dtype).clamp_(min=limits.tiny * limits.eps)  # the smallest number above 0
        values = weight.clone()
        for part, scales in _with_scales(values, scale, self.hidden):
            part.div_(scales.float())
        return values.round_().clamp_(-LARGEST, LARGEST).to(torch.int8), scale


Form = Dense | Int8
DENSE = Dense()


def join(form: Form, held: Sequence[Tensor]) -> Tensor:
    """Makes the weight of the tensors that hold it, in the order of `form.tensors`."""
    return form.join(dict(zip(form.tensors, held, strict=True)))


def dequantise(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Returns weight * scale in the dtype of `scale`. int8 is exact there, so each product is rounded once."""
    hidden = 1 - axis
    whole = weight.to(scale.dtype)
    for part, scales in _with_scales(whole, scale, hidden):
        part.mul_(scales)
    return whole


def _blocks(matrix: Tensor, hidden: int) -> Iterator[Tensor]:
    """Yields views with the elements of a block on dimension hidden + 1: of all whole blocks, then of a short one."""
    size = matrix.shape[hidden]
    whole = size - size % BLOCK
    if whole:
        yield matrix.narrow(hidden, 0, whole).unflatten(hidden, (-1, BLOCK))
    if whole < size:
        yield matrix.narrow(hidden, whole, size - whole).unflatten(hidden, (1, -1))


def _with_scales(matrix: Tensor, scale: Tensor, hidden: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields these views, each with its scales, ready to be multiplied."""
    first = 0
    for part in _blocks(matrix, hidden):
        count = part.shape[hidden]
        yield part, scale.narrow(hidden, first, count).unsqueeze(hidden + 1)
        first += count
