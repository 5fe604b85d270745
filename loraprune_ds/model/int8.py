"""Stores the frozen weight of a linear as int8, with a scale for each block of BLOCK neighbours along the hidden axis.

The last block may be short, and each expert of a stack has separate blocks. A row, column or expert that leaves takes
whole blocks with it, so cutting and quantising commute bit by bit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from loraprune_ds.model.frozen import (
    BLOCK,
    READ_CHUNK,
    SCALE,
    WEIGHT,
    Matrix,
    NotFinite,
    Quantised,
    ReadPart,
    Slice,
    StoredTensor,
    fill,
)

LARGEST = 127
UNSTACKED = 1 << 40  # more rows than any matrix has

Rows = TypeVar("Rows", int, Tensor)


@dataclass(frozen=True)
class Int8(Quantised):
    """int8 weights with scales in the model's dtype: W = weight * weight_scale, rounded to that dtype.

    A band is one row (axis 0), or up to BLOCK rows (axis 1).

    Attributes:
        axis: the axis without blocks.
        rows: the rows of one matrix, if several are stacked with blocks along the rows. Default: one matrix.
    """

    per_byte: ClassVar[int] = 1
    transposed: ClassVar[bool] = False
    axis: int
    rows: int = UNSTACKED

    @property
    def _band(self) -> int:
        return 1 if self.axis == 0 else BLOCK

    @property
    def _bands(self) -> int:
        return -(-self.rows // self._band)

    def _band_of(self, row: Rows) -> Rows:
        return row // self.rows * self._bands + row % self.rows // self._band

    def _top(self, band: int) -> int:
        return band // self._bands * self.rows + band % self._bands * self._band

    def scale_shape(self, shape: Matrix) -> Matrix:
        if self.axis == 0:
            return shape[0], -(-shape[1] // BLOCK)
        return self._band_of(shape[0] - 1) + 1, shape[1]

    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        return {
            WEIGHT: StoredTensor(shape, 1),
            SCALE: StoredTensor(self.scale_shape(shape), element_size),
        }

    def empty(self, shape: Matrix, like: Tensor) -> dict[str, Tensor]:
        values = like.new_empty(shape, dtype=torch.int8)
        return {WEIGHT: values, SCALE: like.new_empty(self.scale_shape(shape))}

    @torch.no_grad()
    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Computes these tensors like `Dense.split`, some rows in fp32 at a time. Raises NotFinite."""
        rows = self._band * max(1, READ_CHUNK // (self._band * weight.shape[1]))
        values: list[Tensor] = []
        scales: list[Tensor] = []
        for matrix in weight.split(self.rows):
            for part in matrix.split(rows):
                part_values, part_scales = self._quantise(part.float(), dtype)
                values.append(part_values)
                scales.append(part_scales)
        return {WEIGHT: torch.cat(values), SCALE: torch.cat(scales)}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        weight, scale = stored
        if len(weight) <= self.rows:  # saves the copy
            return dequantise(weight, scale, self.axis)
        matrices = zip(weight.split(self.rows), scale.split(self._bands), strict=True)
        return torch.cat([dequantise(*matrix, self.axis) for matrix in matrices])

    def kept(self, axis: int, kept: Tensor) -> dict[str, Slice]:
        scales = kept if axis == self.axis else self._band_of(kept).unique()
        return {WEIGHT: Slice(axis, kept), SCALE: Slice(axis, scales)}

    def read(
        self, name: str, shape: Matrix, start: int, end: int, read: ReadPart, dtype: torch.dtype
    ) -> Tensor:
        rows, columns = shape
        width = self.scale_shape(shape)[1]  # of a row of scales
        if name == SCALE:
            bands = range(start // width, -(-end // width))
            flat = torch.empty(end - start, dtype=dtype)
        else:
            bands = self.bands(shape, start, end)
            flat = torch.empty(end - start, dtype=torch.int8)
        for first, last in self._chunks(bands, max(1, READ_CHUNK // (self._band * columns))):
            top = self._top(first)
            bottom = min(self._top(last), rows)
            part = read(top * columns, bottom * columns).view(-1, columns)
            values, scales = self._quantise(part, dtype)
            if name == WEIGHT:
                fill(flat, start, values.reshape(-1), top * columns)
            else:
                fill(flat, start, scales.reshape(-1), first * width)
        return flat

    def _chunks(self, bands: range, count: int) -> Iterator[tuple[int, int]]:
        """Splits bands into ranges of at most `count`, each within one matrix."""
        first = bands.start
        while first < bands.stop:
            last = min(first + count, bands.stop, (first // self._bands + 1) * self._bands)
            yield first, last
            first = last

    def bands(self, shape: Matrix, start: int, end: int) -> range:
        first = self._band_of(start // shape[1])
        if end <= start:
            return range(first, first)
        last = self._band_of((end - 1) // shape[1])
        return range(first, last + 1)

    def elements(self, flat: Tensor) -> Tensor:
        return flat

    def decode(self, rows: Tensor, first: int, scales: Tensor, first_band: int) -> Tensor:
        bands = self._band_of(torch.arange(first, first + len(rows), device=rows.device))
        scales = scales.index_select(0, bands - first_band)
        if self.axis == 0:
            return dequantise(rows, scales, 0).float()
        return rows.to(scales.dtype).mul_(scales).float()

    def _quantise(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden = 1 - self.axis
        limits = torch.finfo(dtype)
        smallest = limits.tiny * limits.eps  # of all numbers above 0
        values = torch.empty_like(weight, dtype=torch.int8)
        scales: list[Tensor] = []
        for part, out in zip(_blocks(weight, hidden), _blocks(values, hidden), strict=True):
            largest = part.abs().amax(hidden + 1)
            if not torch.isfinite(largest).all():
                raise NotFinite
            scale = (largest / LARGEST).to(dtype).clamp_(min=smallest)
            quotients = part / scale.unsqueeze(hidden + 1).float()
            out.copy_(quotients.round_().clamp_(-LARGEST, LARGEST))
            scales.append(scale)
        return values, torch.cat(scales, hidden)


def dequantise(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Returns weight * scale in the dtype of `scale`. int8 is exact in that dtype, so each product is rounded once."""
    product = weight.to(scale.dtype)
    hidden = 1 - axis
    first = 0
    for part in _blocks(product, hidden):
        count = part.shape[hidden]
        scales = scale.narrow(hidden, first, count)
        part.mul_(scales.unsqueeze(hidden + 1))
        first += count
    return product


def _blocks(matrix: Tensor, hidden: int) -> Iterator[Tensor]:
    """Yields views of all full blocks and of a short last block. Dimension hidden + 1 runs within a block."""
    size = matrix.shape[hidden]
    full = size - size % BLOCK
    if full:
        yield matrix.narrow(hidden, 0, full).unflatten(hidden, (-1, BLOCK))
    if full < size:
        yield matrix.narrow(hidden, full, size - full).unflatten(hidden, (1, -1))
