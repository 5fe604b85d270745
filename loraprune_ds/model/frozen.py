"""Storage formats for the frozen weight of a linear: unchanged, or int8 with scales.

int8 has one scale for each block of BLOCK neighbours along the hidden axis. The last block may be short, and each
expert of a stack has separate blocks. No cut shortens the hidden axis. A row, column or expert that leaves takes whole
blocks with it, so cutting and quantising commute bit by bit.

A storage format names the tensors that store a weight and converts between them and the weight.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Dtype

# the dtypes of a config
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
WEIGHT = "weight"
SCALE = "weight_scale"
BLOCK = 64  # weights per scale. 32 gave no lower perplexity (tests/benchmarks/README.md)
LARGEST = 127
UNSTACKED = 1 << 40  # more rows than any matrix has
# elements converted at a time, so reading needs little memory beyond the shard
READ_CHUNK = 1 << 24

Matrix = tuple[int, int]
Rows = TypeVar("Rows", int, Tensor)
# (start, end) -> the flat elements [start, end) of a weight, fp32
ReadPart = Callable[[int, int], Tensor]


class Pieces(NamedTuple):
    """Names the tensors on disk that make up one parameter, stacked along axis 0."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each tensor. A single tensor may have three dimensions
    transposed: bool = False  # the files have each matrix transposed

    def keep_rows(self, rows: Tensor) -> "Pieces":
        """Returns the pieces that hold these rows of the parameter. Each piece is kept whole or dropped."""
        kept: list[int] = cast(Any, rows[:: self.shape[0]] // self.shape[0]).tolist()
        return self._replace(names=tuple(self.names[i] for i in kept))


def describe_dtype(model: ModelConfig) -> str:
    return model.dtype if model.frozen is None else f"{model.dtype} with {model.frozen} linears"


class NotFinite(ValueError):
    """Raised for a weight with an inf or NaN, which int8 cannot represent."""


class StoredTensor(NamedTuple):
    """A tensor that ZeRO-3 shards."""

    shape: tuple[int, ...]
    element_size: int


def fill(flat: Tensor, start: int, values: Tensor, origin: int) -> None:
    """Fills `flat`, which starts at `start`, with all its values among `values`, which start at `origin`."""
    low = max(start, origin)
    high = min(start + len(flat), origin + len(values))
    flat[low - start : high - start] = values[low - origin : high - origin]


@dataclass(frozen=True)
class Dense:
    """Stores the weight unchanged. `tensors` names the stored parameters."""

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT,)

    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        """Returns the tensors that store a weight of `shape`. `element_size` is of the model's dtype, in bytes."""
        return {WEIGHT: StoredTensor(shape, element_size)}

    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Computes these tensors from the weight."""
        return {WEIGHT: weight.to(dtype)}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        """Computes the weight from these tensors, in the order of `tensors`."""
        (weight,) = stored
        return weight

    def kept(self, axis: int, kept: Tensor) -> dict[str, Tensor]:
        """Returns the rows (or columns) of each tensor that belong to these rows (or columns) of the weight."""
        return {WEIGHT: kept}


@dataclass(frozen=True)
class Int8:
    """int8 weights with scales in the model's dtype: W = weight * weight_scale, rounded to that dtype.

    Rows form bands that share no scale: one row each (axis 0), or up to BLOCK rows (axis 1). Each band has one row of
    scales, so any flat part of either tensor can be computed from complete rows of the weight.

    Attributes:
        axis: the axis without blocks.
        rows: the rows of one matrix, if several are stacked with blocks along the rows. Default: one matrix.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, SCALE)
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

    def kept(self, axis: int, kept: Tensor) -> dict[str, Tensor]:
        scales = kept if axis == self.axis else self._band_of(kept).unique()
        return {WEIGHT: kept, SCALE: scales}

    def read(
        self, name: str, shape: Matrix, start: int, end: int, read: ReadPart, dtype: torch.dtype
    ) -> Tensor:
        """Returns the flat elements [start, end) of the tensor `name`, which stores a weight of `shape`.

        Args:
            read: reads complete bands of the weight.

        Raises:
            NotFinite: a part has an inf or NaN.
        """
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
        """Returns the rows of scales that the flat elements [start, end) of a weight need."""
        first = self._band_of(start // shape[1])
        if end <= start:
            return range(first, first)
        last = self._band_of((end - 1) // shape[1])
        return range(first, last + 1)

    def decode(self, rows: Tensor, first: int, scales: Tensor, first_band: int) -> Tensor:
        """Returns some rows of the weight in fp32, after rounding to the dtype of the scales.

        Args:
            rows: (rows, columns) int8, from row `first` of the weight.
            scales: rows of scales, from row `first_band` of all scales.
        """
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


StorageFormat = Dense | Int8
DENSE = Dense()


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


class FrozenLinear(nn.Linear):
    """A linear whose frozen weight may have another storage format. PEFT wraps it like any linear."""

    stored_as: StorageFormat = DENSE

    def store_as(self, stored_as: Int8, like: Tensor) -> None:
        """Replaces the weight with parameters of the format, without values, with dtype and device of `like`."""
        shape = (self.out_features, self.in_features)
        weight = like.new_empty(shape, dtype=torch.int8)
        scale = like.new_empty(stored_as.scale_shape(shape))
        self.register_parameter(WEIGHT, nn.Parameter(weight, requires_grad=False))
        self.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        self.stored_as = stored_as


class Int8Linear(FrozenLinear):
    """A linear with `weight` (out_features, in_features) int8 and `weight_scale` in the dtype of the bias."""

    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, stored_as: Int8) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.store_as(stored_as, linear.weight)
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.stored_as.join(stored_tensors(self))
        return nn.functional.linear(input, weight, self.bias)


def storage_format(linear: nn.Module) -> StorageFormat:
    return linear.stored_as if isinstance(linear, FrozenLinear) else DENSE


def holds_int8(model: nn.Module) -> bool:
    """True if a model, or one of its layers, has int8 linears."""
    return any(isinstance(storage_format(module), Int8) for module in model.modules())


def stored_tensors(linear: nn.Module) -> list[Tensor]:
    return [getattr(linear, name) for name in storage_format(linear).tensors]
