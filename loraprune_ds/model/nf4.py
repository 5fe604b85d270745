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
    Slice,
    StorageFormat,
    StoredTensor,
)

# The quantiles of a normal distribution that the 16 codes stand for, as bitsandbytes has them.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # of the scales that a block is divided by


@dataclass(frozen=True)
class NF4(StorageFormat):
    """4-bit codes with scales: W, or W transposed, as (rows, hidden).

    `weight` is uint8, (rows, hidden / 2), the first neighbour in the upper half of a byte. `weight_scale` is fp32,
    (rows, hidden / BLOCK), the largest absolute value of a block.

    Attributes:
        axis: the axis of W without blocks. A cut is along this axis.
        dtype: of the weight that the linear computes with.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, SCALE)
    axis: int
    dtype: torch.dtype

    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        rows = shape[self.axis]
        hidden = shape[1 - self.axis]
        return {
            WEIGHT: StoredTensor((rows, hidden // 2), 1),
            SCALE: StoredTensor((rows, hidden // BLOCK), 4),
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

    def _dequantise(self, codes: Tensor, scale: Tensor) -> Tensor:
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
def _pairs(device: torch.device) -> Tensor:
    """Returns the two values that each byte stands for: (256, 2)."""
    values = torch.tensor(VALUES, device=device)
    return torch.cartesian_prod(values, values)


def _quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of complete rows, with the operations of bitsandbytes."""
    blocks = rows.float().contiguous().view(len(rows), -1, BLOCK)
    scale = blocks.abs().amax(2)
    if not torch.isfinite(scale).all():
        raise NotFinite
    blocks = blocks * (1.0 / scale.clamp(min=SMALLEST)).unsqueeze(2)
    values = torch.tensor(VALUES, device=rows.device)
    bounds = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks.clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8)
    codes = codes.view(len(rows), -1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale
