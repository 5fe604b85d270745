"""What storage formats of the frozen weight of a linear share. Dense is the weight unchanged.

int8.py and nf4.py quantise in blocks of BLOCK neighbours along the hidden axis, with a scale for each. No cut shortens
that axis. A row or column that leaves takes whole blocks with it, so cutting and quantising commute bit by bit.

A storage format names the tensors that store a weight and converts between them and the weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Dtype

# the dtypes of a config
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}
WEIGHT = "weight"
SCALE = "weight_scale"
BLOCK = 64  # weights per scale. 32 gave no lower perplexity (tests/benchmarks/README.md)
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


class NotFinite(ValueError):
    """Raised for a weight with an inf or NaN, which no quantised format can represent."""


class StoredTensor(NamedTuple):
    """A tensor that ZeRO-3 shards."""

    shape: tuple[int, ...]
    element_size: int


def fill(flat: Tensor, start: int, values: Tensor, origin: int) -> None:
    """Fills `flat`, which starts at `start`, with all its values among `values`, which start at `origin`."""
    low = max(start, origin)
    high = min(start + len(flat), origin + len(values))
    flat[low - start : high - start] = values[low - origin : high - origin]


class StorageFormat(ABC):
    """Converts between a weight and the tensors that store it. `tensors` names these parameters."""

    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        """Returns the tensors that store a weight of `shape`. `element_size` is of the model's dtype, in bytes."""

    @abstractmethod
    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Computes these tensors from the weight. `dtype` is the model's."""

    @abstractmethod
    def join(self, stored: Iterable[Tensor]) -> Tensor:
        """Computes the weight from these tensors, in the order of `tensors`."""

    @abstractmethod
    def kept(self, axis: int, kept: Tensor) -> dict[str, Slice]:
        """Returns the part of each tensor that belongs to these rows (axis 0) or columns (axis 1) of the weight."""


@dataclass(frozen=True)
class Dense(StorageFormat):
    """Stores the weight unchanged."""

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT,)

    def stored(self, shape: Matrix, element_size: int) -> dict[str, StoredTensor]:
        return {WEIGHT: StoredTensor(shape, element_size)}

    def split(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {WEIGHT: weight.to(dtype)}

    def join(self, stored: Iterable[Tensor]) -> Tensor:
        (weight,) = stored
        return weight

    def kept(self, axis: int, kept: Tensor) -> dict[str, Slice]:
        return {WEIGHT: Slice(axis, kept)}


DENSE = Dense()

# (start, end) -> the flat elements [start, end) of a weight, or of its transpose if it is stored so, fp32
ReadPart = Callable[[int, int], Tensor]


class Quantised(StorageFormat):
    """Stores integers and scales of blocks. Ranks read, shard and score them without the others' parts.

    Rows form bands that share no scale, and each band has one row of scales. So any flat part of either tensor can be
    computed from complete rows of the weight.
    """

    tensors: ClassVar[tuple[str, ...]] = (WEIGHT, SCALE)
    per_byte: ClassVar[int]  # elements in a byte
    transposed: ClassVar[bool]

    @abstractmethod
    def scale_shape(self, shape: Matrix) -> Matrix:
        """Returns (bands, scales of a band) of a weight of `shape`."""

    @abstractmethod
    def empty(self, shape: Matrix, like: Tensor) -> dict[str, Tensor]:
        """Returns these tensors without values, on the device of `like`. Its dtype is the model's."""

    @abstractmethod
    def read(
        self, name: str, shape: Matrix, start: int, end: int, read: ReadPart, dtype: torch.dtype
    ) -> Tensor:
        """Returns the flat elements [start, end) of the tensor `name`, which stores a weight of `shape`.

        Args:
            read: reads complete bands of the weight.

        Raises:
            NotFinite: a part has an inf or NaN.
        """

    @abstractmethod
    def bands(self, shape: Matrix, start: int, end: int) -> range:
        """Returns the rows of scales that the flat bytes [start, end) of a weight need."""

    @abstractmethod
    def elements(self, flat: Tensor) -> Tensor:
        """Returns an integer for each element of a flat part of the weight."""

    @abstractmethod
    def decode(self, rows: Tensor, first: int, scales: Tensor, first_band: int) -> Tensor:
        """Returns some rows of the weight in fp32, after rounding to the dtype of the weight.

        Args:
            rows: (rows, columns) of `elements`, from row `first`.
            scales: rows of scales, from row `first_band` of all scales.
        """


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


def stored_tensors(linear: nn.Module) -> list[Tensor]:
    return [getattr(linear, name) for name in storage_format(linear).tensors]
