"""Stores the frozen weight of a linear in 4 bits, as NF4 of QLoRA (arXiv 2305.14314).

Where rows may leave, codes and scales equal bitsandbytes' bit by bit. Its blocks run along the inputs. Where
columns may leave, W is stored transposed, so blocks run along the hidden axis as well.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

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

# The quantiles of a normal distribution that the 16 codes stand for, as bitsandbytes has them.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # of the scales that a block is divided by
# decoded at a time without a GPU's kernels, which pass weights through fp32
CHUNK = 1 << 20


@dataclass(frozen=True)
class NF4(Quantised):
    """4-bit codes with scales: W, or W transposed, as (rows, hidden).

    `weight` is uint8, (rows, hidden / 2), the first neighbour in the upper half of a byte. `weight_scale` is fp32,
    (rows, hidden / BLOCK), the largest absolute value of a block. A band is one row.

    Attributes:
        axis: the axis of W without blocks. A cut is along this axis.
        dtype: of the weight that the linear computes with.
    """

    per_byte: ClassVar[int] = 2
    axis: int
    dtype: torch.dtype

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        return self.axis == 1

    def scale_shape(self, shape: Matrix) -> Matrix:
        return shape[self.axis], shape[1 - self.axis] // BLOCK

    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        rows, blocks = self.scale_shape(shape)
        return {
            WEIGHT: StoredTensor((rows, blocks * BLOCK // 2), 1),
            SCALE: StoredTensor((rows, blocks), 4),
        }

    def empty(self, shape: Matrix, like: Tensor) -> dict[str, Tensor]:
        dtypes = {WEIGHT: torch.uint8, SCALE: torch.float32}
        return {
            name: like.new_empty(stored.shape, dtype=dtypes[name])
            for name, stored in self.stored(shape, 1).items()
        }

    @torch.no_grad()
    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Computes these tensors, some rows in fp32 at a time. Raises NotFinite."""
        matrix = weight if self.axis == 0 else weight.t()
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        for part in matrix.split(max(1, READ_CHUNK // matrix.shape[1])):
            part_codes, part_scales = _quantise(part)
            codes.append(part_codes)
            scales.append(part_scales)
        return {WEIGHT: torch.cat(codes), SCALE: torch.cat(scales)}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        codes, scale = stored
        matrix = self._dequantise(codes, scale)
        return matrix if self.axis == 0 else matrix.t()

    def kept(self, axis: int, kept: Tensor) -> dict[str, Slice]:
        return {WEIGHT: Slice(0, kept), SCALE: Slice(0, kept)}

    def read(
        self, name: str, shape: Matrix, start: int, end: int, read: ReadPart, dtype: torch.dtype
    ) -> Tensor:
        hidden = shape[1 - self.axis]
        if name == SCALE:
            width = hidden // BLOCK
            flat = torch.empty(end - start)
        else:
            width = hidden // 2
            flat = torch.empty(end - start, dtype=torch.uint8)
        last = -(-end // width)
        step = max(1, READ_CHUNK // hidden)
        for first in range(start // width, last, step):
            part = read(first * hidden, min(first + step, last) * hidden).view(-1, hidden)
            values = _scales(_blocks(part)) if name == SCALE else _quantise(part)[0]
            fill(flat, start, values.reshape(-1), first * width)
        return flat

    def bands(self, shape: Matrix, start: int, end: int) -> range:
        width = shape[1 - self.axis] // 2
        return range(start // width, -(-end // width) if end > start else start // width)

    def elements(self, flat: Tensor) -> Tensor:
        return torch.stack([flat >> 4, flat & 15], 1).view(-1)

    def decode(self, rows: Tensor, first: int, scales: Tensor, first_band: int) -> Tensor:
        values = _values(rows.device)[rows.int()]
        of_rows = scales[first - first_band :][: len(rows)]
        _blocks(values).mul_(of_rows.unsqueeze(2))
        return values.to(self.dtype).float()

    def _dequantise(self, codes: Tensor, scale: Tensor) -> Tensor:
        if _kernels() is not None and codes.device.type != "cpu":
            return self._decode_rows(codes, scale)
        rows, width = codes.shape
        matrix = torch.empty((rows, 2 * width), dtype=self.dtype, device=codes.device)
        step = max(1, CHUNK // matrix.shape[1])
        parts = zip(matrix.split(step), codes.split(step), scale.split(step), strict=True)
        for part, of_part, scales in parts:
            part.copy_(self._decode_rows(of_part, scales))
        return matrix

    def _decode_rows(self, codes: Tensor, scale: Tensor) -> Tensor:
        rows, width = codes.shape
        shape = (rows, 2 * width)
        kernels = _kernels()
        if kernels is not None:
            return kernels.dequantize_4bit(
                codes.view(-1, 1), scale.view(-1), BLOCK, "nf4", shape, self.dtype
            )
        values = torch.nn.functional.embedding(codes.int(), _pairs(codes.device))
        blocks = values.view(*scale.shape, BLOCK)
        return blocks.mul_(scale.unsqueeze(2)).view(shape).to(self.dtype)


@cache
def _kernels() -> Any:
    """Returns the kernels of bitsandbytes, which are faster, or None if it is not installed."""
    try:
        import bitsandbytes  # noqa: F401  registers them
    except ImportError:
        return None
    return torch.ops.bitsandbytes


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(VALUES, device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Returns the two values that each byte stands for: (256, 2)."""
    values = _values(device)
    return torch.cartesian_prod(values, values)


def _blocks(rows: Tensor) -> Tensor:
    """Returns a view, (rows, blocks, BLOCK)."""
    return rows.view(len(rows), -1, BLOCK)


def _scales(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(2)
    if not torch.isfinite(scale).all():
        raise NotFinite
    return scale


def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of complete rows, with the operations of bitsandbytes."""
    blocks = _blocks(rows.float().contiguous())
    scale = _scales(blocks)
    blocks = blocks * (1.0 / scale.clamp(min=SMALLEST)).unsqueeze(2)
    values = _values(rows.device)
    bounds = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8)
    codes = codes.view(len(rows), -1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale
