"""Codes of 8 and of 4 bits for rows of numbers, with a scale for each block of BLOCK neighbours in a row.

int8.md says how another codec is added.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

BLOCK = 64  # weights per scale. 32 gave no lower perplexity (tests/benchmarks/README.md)
LARGEST = 127  # code of 8 bits
# The quantiles of a normal distribution that the 16 codes of NF4 stand for, as bitsandbytes has them.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
SMALLEST = 1e-38  # of the scales that a block of NF4 is divided by
# decoded at a time without a GPU's kernels, which pass weights through fp32
CHUNK = 1 << 20


class NotFinite(ValueError):
    """Raised for an inf or NaN, which no code stands for."""


@dataclass(frozen=True)  # so copies are equal
class Codec(ABC):
    """Converts between rows of numbers, (rows, hidden), and their codes with scales, (rows, blocks)."""

    name: ClassVar[str]  # as in `model.frozen`
    per_byte: ClassVar[int]  # numbers in a byte of codes
    dtype: ClassVar[torch.dtype]  # of such a byte
    scale_dtype: ClassVar[torch.dtype | None] = None  # None: that of the numbers
    whole_blocks: ClassVar[bool] = False  # rows have no short last block

    @abstractmethod
    def scales(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes the scales of rows in fp32, which are numbers of `dtype`. Raises NotFinite."""

    @abstractmethod
    def codes(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Computes the codes of rows in fp32: (rows, hidden / per_byte)."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes the rows. Each product of a code and its scale is rounded once, to `dtype`."""

    def elements(self, codes: Tensor) -> Tensor:
        """Returns an integer for each number of flat codes."""
        return codes

    def decode_elements(self, elements: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes the rows like `decode`, from such integers: (rows, hidden)."""
        return self.decode(elements, scales, dtype)


class Int8Codec(Codec):
    """int8, with scales in the dtype of the numbers."""

    name = "int8"
    per_byte = 1
    dtype = torch.int8

    def scales(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        limits = torch.finfo(dtype)
        smallest = limits.tiny * limits.eps  # of all numbers above 0
        scales = _largest(rows) / LARGEST
        return scales.to(dtype).clamp_(min=smallest)

    def codes(self, rows: Tensor, scales: Tensor) -> Tensor:
        quotients = _blocks(rows) / scales.unsqueeze(2).float()
        codes = quotients.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return codes.flatten(1)[:, : rows.shape[1]]

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = _blocks(codes.to(dtype))  # int8 is exact in it
        blocks *= scales.unsqueeze(2)
        return blocks.flatten(1)[:, : codes.shape[1]].contiguous()


class NF4Codec(Codec):
    """NF4 of QLoRA (arXiv 2305.14314). Codes and scales equal those of bitsandbytes bit by bit.

    A byte has two codes, the first neighbour in the upper half. A scale is the largest absolute value of its block.
    """

    name = "nf4"
    per_byte = 2
    dtype = torch.uint8
    scale_dtype = torch.float32
    whole_blocks = True

    def scales(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        return _largest(rows)

    def codes(self, rows: Tensor, scales: Tensor) -> Tensor:
        factors = 1.0 / scales.clamp(min=SMALLEST)
        blocks = _blocks(rows) * factors.unsqueeze(2)
        values = _values(rows.device)
        bounds = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(blocks.clamp_(-1, 1), bounds, out_int32=True)
        codes = codes.to(torch.uint8).flatten(1)
        return codes[:, ::2] << 4 | codes[:, 1::2]

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        if _kernels() is not None and codes.device.type != "cpu":
            return _decode_nf4(codes, scales, dtype)
        hidden = 2 * codes.shape[1]
        rows = torch.empty((len(codes), hidden), dtype=dtype, device=codes.device)
        step = max(1, CHUNK // hidden)
        parts = zip(rows.split(step), codes.split(step), scales.split(step), strict=True)
        for part, part_codes, part_scales in parts:
            part.copy_(_decode_nf4(part_codes, part_scales, dtype))
        return rows

    def elements(self, codes: Tensor) -> Tensor:
        return torch.stack([codes >> 4, codes & 15], 1).view(-1)

    def decode_elements(self, elements: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        rows = _values(elements.device)[elements.int()]
        blocks = _blocks(rows)
        blocks *= scales.unsqueeze(2)
        return rows.to(dtype)


INT8 = Int8Codec()
NF4 = NF4Codec()
CODECS = {codec.name: codec for codec in (INT8, NF4)}


def _blocks(rows: Tensor) -> Tensor:
    """Returns (rows, blocks, BLOCK), a view unless zeros fill a short last block."""
    short = -rows.shape[1] % BLOCK
    if short:
        rows = pad(rows, (0, short))
    return rows.unflatten(1, (-1, BLOCK))


def _largest(rows: Tensor) -> Tensor:
    """Returns the largest absolute value of each block."""
    largest = _blocks(rows).abs().amax(2)
    if not torch.isfinite(largest).all():
        raise NotFinite
    return largest


def _decode_nf4(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = codes.shape
    shape = (rows, 2 * width)
    kernels = _kernels()
    if kernels is not None:
        flat = codes.view(-1, 1)
        return kernels.dequantize_4bit(flat, scales.view(-1), BLOCK, "nf4", shape, dtype)
    values = embedding(codes.int(), _pairs(codes.device)).view(shape)
    blocks = _blocks(values)
    blocks *= scales.unsqueeze(2)
    return values.to(dtype)


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
