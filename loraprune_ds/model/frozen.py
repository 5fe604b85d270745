"""How the frozen weight of a linear is stored: unchanged, or as codes of blocks (codecs.py).

A block has BLOCK neighbours in a stored row, and each row has separate scales. A linear that loses columns is stored
transposed. So what leaves are whole rows of codes and scales, also of a stack, which loses whole experts. Cutting and
quantising commute bit by bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.model.codecs import BLOCK, Codec

# the dtypes of a config
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
WEIGHT = "weight"
SCALE = "weight_scale"
# elements converted at a time, so reading needs little memory beyond the shard
READ_CHUNK = 1 << 24

Matrix = tuple[int, int]


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) that stay: `keep` is (kept,) int64, ascending."""

    axis: int
    keep: Tensor


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


class StoredTensor(NamedTuple):
    """A tensor that ZeRO-3 shards."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def fill(flat: Tensor, start: int, values: Tensor, origin: int) -> None:
    """Fills `flat`, which starts at `start`, with all its values among `values`, which start at `origin`."""
    low = max(start, origin)
    high = min(start + len(flat), origin + len(values))
    flat[low - start : high - start] = values[low - origin : high - origin]


class StorageFormat(ABC):
    """Converts between a weight and the tensors that store it. `tensors` names these parameters."""

    tensors: ClassVar[tuple[str, ...]]

    @property
    def per_element(self) -> int:
        """The elements of the weight in one element of the first tensor."""
        return 1

    @abstractmethod
    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """Computes these tensors from the weight."""

    @abstractmethod
    def join(self, stored: Iterable[Tensor]) -> Tensor:
        """Computes the weight from these tensors, in the order of `tensors`."""

    @abstractmethod
    def kept(self, part: Slice) -> Slice:
        """Returns the part of each tensor that belongs to a part of the weight, which a cut leaves."""


@dataclass(frozen=True)
class Dense(StorageFormat):
    """Stores the weight unchanged."""

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT,)

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        return {WEIGHT: weight}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        (weight,) = stored
        return weight

    def kept(self, part: Slice) -> Slice:
        return part


DENSE = Dense()
# (first, last) -> the rows [first, last) of a weight, or of its transpose if it is stored so, fp32
ReadRows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Blocks(StorageFormat):
    """Stores rows of codes and of scales. Ranks read, shard and score them without the others' parts.

    Attributes:
        dtype: of the weight that the linear computes with.
        transposed: the rows are the weight's columns, which leave.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, SCALE)
    codec: Codec
    dtype: torch.dtype
    transposed: bool = False

    @property
    def per_element(self) -> int:
        return self.codec.per_byte

    def matrix(self, shape: Matrix) -> Matrix:
        """Returns (rows, hidden) of a weight of `shape`, as it is stored."""
        rows, hidden = shape
        return (hidden, rows) if self.transposed else shape

    def fits(self, shape: Matrix) -> bool:
        """Tells whether a weight of `shape` has whole blocks, if the codec needs them."""
        _, hidden = self.matrix(shape)
        return not self.codec.whole_blocks or hidden % BLOCK == 0

    def stored(self, shape: Matrix) -> dict[str, StoredTensor]:
        """Returns the tensors that store a weight of `shape`."""
        codec = self.codec
        rows, hidden = self.matrix(shape)
        blocks = -(-hidden // BLOCK)
        codes = StoredTensor((rows, hidden // codec.per_byte), codec.dtype)
        scales = StoredTensor((rows, blocks), codec.scale_dtype or self.dtype)
        return {WEIGHT: codes, SCALE: scales}

    @torch.no_grad()
    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """Computes these tensors, some rows in fp32 at a time. Raises NotFinite."""
        if self.transposed:
            weight = weight.t()
        codes: list[Tensor] = []
        scales: list[Tensor] = []
        for part in weight.split(max(1, READ_CHUNK // weight.shape[1])):
            rows = part.contiguous().float()
            scales.append(self.codec.scales(rows, self.dtype))
            codes.append(self.codec.codes(rows, scales[-1]))
        return {WEIGHT: torch.cat(codes), SCALE: torch.cat(scales)}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        codes, scales = stored
        rows = self.codec.decode(codes, scales, self.dtype)
        return rows.t() if self.transposed else rows

    def kept(self, part: Slice) -> Slice:
        return part._replace(axis=0)

    def read(self, name: str, shape: Matrix, start: int, end: int, read: ReadRows) -> Tensor:
        """Returns the flat elements [start, end) of the tensor `name`, which stores a weight of `shape`.

        Raises:
            NotFinite: a part has an inf or NaN.
        """
        (_, width), dtype = self.stored(shape)[name]
        _, hidden = self.matrix(shape)
        flat = torch.empty(end - start, dtype=dtype)
        last = -(-end // width)
        step = max(1, READ_CHUNK // hidden)
        for first in range(start // width, last, step):
            rows = read(first, min(first + step, last))
            values = self.codec.scales(rows, self.dtype)
            if name == WEIGHT:
                values = self.codec.codes(rows, values)
            fill(flat, start, values.flatten(), first * width)
        return flat

    def decode(self, elements: Tensor, first: int, scales: Tensor, first_scales: int) -> Tensor:
        """Returns some stored rows in fp32, after rounding to the dtype of the weight.

        Args:
            elements: (rows, hidden) integers of the codec, from row `first`.
            scales: those of rows from `first_scales`.
        """
        of_rows = scales[first - first_scales :][: len(elements)]
        return self.codec.decode_elements(elements, of_rows, self.dtype).float()


class FrozenLinear(nn.Linear):
    """A linear whose frozen weight may have another storage format. PEFT wraps it like any linear."""

    stored_as: StorageFormat = DENSE

    def store_as(self, stored_as: StorageFormat, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the weight with the tensors of a format, which may be without values."""
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.stored_as = stored_as


class QuantisedLinear(FrozenLinear):
    """A linear with `weight` and `weight_scale` of a quantised format, and the bias of the linear that it replaces."""

    weight_scale: nn.Parameter

    def __init__(
        self, linear: nn.Linear, stored_as: StorageFormat, tensors: Mapping[str, Tensor]
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.store_as(stored_as, tensors)
        self.register_parameter("bias", linear.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantisedLinear":
        """Never casts the tensors that store the weight, as `model.to(torch.bfloat16)` would."""
        stored = set(stored_tensors(self))

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor in stored else moved

        return super()._apply(move, recurse)

    def forward(self, input: Tensor) -> Tensor:
        stored = stored_tensors(self)
        return cast(Tensor, _Product.apply(input, self.bias, self.stored_as, *stored))


class _Product(torch.autograd.Function):
    """Maps x to x·Wᵀ + bias, with a gradient for x. autograd saves the stored tensors, not W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, stored_as: StorageFormat, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.stored_as = stored_as
        ctx.dtype = x.dtype
        weight = stored_as.join(stored)
        if bias is not None:
            bias = bias.to(weight.dtype)
        # After peft.prepare_model_for_kbit_training norms give fp32, and so biases are fp32.
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stored = ctx.saved_tensors
        weight = ctx.stored_as.join(stored)
        x_gradient = (gradient.to(weight.dtype) @ weight).to(ctx.dtype)
        without_gradient = [None] * (2 + len(stored))
        return x_gradient, *without_gradient


def storage_format(linear: nn.Module) -> StorageFormat:
    return linear.stored_as if isinstance(linear, FrozenLinear) else DENSE


def stored_tensors(linear: nn.Module) -> list[nn.Parameter]:
    return [getattr(linear, name) for name in storage_format(linear).tensors]
