"""Groups: the parts of a layer that leave as a unit, by kind, and the tensors of a layer, which they leave.

heads        One key-value head with all the query heads that read it. Under MHA it is one head.
query_heads  One query head, in models with one or two key-value heads. These stay, and an equal number leaves each.
channels     One MLP channel.
delta        One key head of a gated delta net with its value heads. Layers with these have no attention.
experts      One expert of a mixture (experts.py).
cross_heads  One head of a decoder's attention to its encoder. Layers of the encoder have none.

A dense layer among sparse ones has heads and no experts. Its MLP is never cut. A layer of Mamba-2 alone has no groups.

A layer is a list of tensors. Along one axis a tensor is a sequence of spans, and a cut takes groups out of each span.
A span has all groups of one kind, one after another. Each group is `width` rows (or columns) wide. That covers separate
weights, fused ones (q|k|v, gate|up), biases, norms and stacks of experts:

    q_proj.weight     Span("heads", 8, 512)                                rows of 8 key-value heads, 4 query heads each
    o_proj.weight     Span("heads", 8, 512), axis 1                        the same groups, as columns
    qkv_proj.weight   Span("heads", 8, 512), Span("heads", 8, 128) twice    queries, keys and values in one tensor

A group leaves all tensors of its layer at once. `cut` says what stays, for every reader of it: the live cut, slices of
files, modules without weights, plans and exports.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from loraprune_ds.model.frozen import (
    DENSE,
    WEIGHT,
    Int8,
    Matrix,
    Pieces,
    StorageFormat,
    StoredTensor,
)

Kind = str
QUERY_HEADS: Kind = "query_heads"
Shape = tuple[int, ...]
T = TypeVar("T")
# Settings that leave layers of one size.
EQUAL_LAYERS = "prune.ranking: uniform, prune.protected_first: 0 and prune.protected_last: 0"


class PerKind(dict[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. Must not change: it is hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class LayerCounts(PerKind[int]):
    """Holds the number of groups of each kind in one layer. 0 of a kind that this layer lacks."""


class LayerTensors(PerKind[Tensor]):
    """Holds one value for every group of a layer: (groups,) for each kind."""

    def select(self, keep: "LayerKeep") -> Self:
        return type(self)((kind, values[keep[kind]]) for kind, values in self.items())


class LayerKeep(LayerTensors):
    """Names the groups that stay in one layer: ascending int64 indices into its current groups."""

    @property
    def counts(self) -> LayerCounts:
        return LayerCounts((kind, len(groups)) for kind, groups in self.items())


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)


class Span(NamedTuple):
    """All groups of one kind along an axis, one after another."""

    kind: Kind
    groups: int
    width: int = 1  # rows or columns of one group
    ranges: int = 1  # of equal size, which must lose the same number of groups each

    @property
    def size(self) -> int:
        return self.groups * self.width

    @property
    def scores(self) -> int:
        """The numbers that `fisher` scores it by: one per group, or second moments of the query heads in each range."""
        return self.groups * (self.groups // self.ranges if self.kind == QUERY_HEADS else 1)

    def resized(self, counts: Mapping[Kind, int]) -> Self:
        return self._replace(groups=counts[self.kind])


class Slice(NamedTuple):
    """Names the rows (axis 0) or columns (axis 1) that stay: `keep` is (kept,) int64, ascending."""

    axis: int
    keep: Tensor


class Attribute(NamedTuple):
    """Names a count that a forward reads from a module of the layer or its config, so that it must follow a cut."""

    module: str  # path inside the layer
    name: str
    span: Span
    ranges: int = 1  # of equal size. It counts the groups of one


class StackSpec(NamedTuple):
    """Describes how a stack of experts is stored: a linear of each, one below the other (experts.py)."""

    # on disk, of one expert, with {} for its number. One without {} is a tensor of all experts
    names: tuple[str, ...]
    reads_channels: bool  # its inputs are an expert's channels, not the hidden states
    transposed: bool = False  # the rows of an expert are its inputs


@dataclass(frozen=True)
class TensorSpec:
    """Describes one tensor of a layer."""

    name: str  # inside the layer, as in transformers' modules
    spans: tuple[Span, ...] = ()  # along `axis`. No cut makes a tensor without spans smaller
    axis: int = 0
    lora: bool = False
    stack: StackSpec | None = None
    on_disk: str | None = None  # its name in weight files, if that differs
    keep_fp32: bool = False  # it is fp32 in every model
    shape: Shape = ()

    @property
    def linear(self) -> str:
        """The name of its module, if it is a weight."""
        return self.name.removesuffix(f".{WEIGHT}")

    @property
    def stock_name(self) -> str:
        """The name of a stack's tensor in transformers' modules."""
        return f"{self.linear}_proj"

    @property
    def kinds(self) -> frozenset[Kind]:
        return frozenset(span.kind for span in self.spans)

    @property
    def matrix(self) -> Matrix:
        """(out_features, in_features) of a weight."""
        rows, columns = self.shape
        return rows, columns

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """The experts of a stack. Another weight is one matrix."""
        return self.spans[0].groups if self.stack else 1

    @property
    def group_width(self) -> int:
        """The rows (axis 0) or columns (axis 1) of one group."""
        return sum(span.width for span in self.spans)

    @property
    def loses_inputs(self) -> bool:
        """True if a cut takes inputs from it, like o_proj and down_proj. Never true of a stack of experts."""
        return bool(self.spans) and self.axis == 1

    @property
    def inputs(self) -> int:
        """The inputs of a linear, or of one expert's."""
        return (
            self.shape[0] // self.matrices
            if self.stack and self.stack.transposed
            else self.shape[1]
        )

    def lora_shapes(self, rank: int) -> tuple[Matrix, Matrix]:
        """Returns the shapes of A (r, in_features) and B (out_features, r). A stack has one A per expert."""
        outputs, inputs = self.matrix
        return (self.matrices * rank, inputs), (outputs, rank)

    def lora_cuts(self, rank: int, weight: Slice, keep: LayerKeep) -> list[tuple[int, Slice]]:
        """Lists the LoRA factors that a cut makes smaller, 0 for A or 1 for B, and what stays of each.

        Args:
            weight: what stays of the weight.
        """
        if self.stack:
            return [(0, Slice(0, group_indices(keep[self.spans[0].kind], rank))), (1, weight)]
        return [(1 - self.axis, weight)]  # A has the inputs, B the outputs

    def shrinks(self, keep: LayerKeep) -> bool:
        """True if some of its groups leave."""
        return any(len(keep[span.kind]) < span.groups for span in self.spans)

    def resized(self, counts: Mapping[Kind, int]) -> "TensorSpec":
        """Returns the tensor with these counts of groups."""
        if not self.spans:
            return self
        spans, shape = tuple(span.resized(counts) for span in self.spans), list(self.shape)
        shape[self.axis] = sum(span.size for span in spans)
        return replace(self, spans=spans, shape=tuple(shape))

    def format(self, int8: bool) -> StorageFormat:
        """Returns how ranks store it. Only linears with LoRA are int8, in blocks along the hidden axis."""
        if not int8 or not self.lora:
            return DENSE
        rows = self.shape[0] // self.matrices
        rows_are_hidden = (
            self.stack.reads_channels != self.stack.transposed if self.stack else self.loses_inputs
        )
        return Int8(1, rows) if rows_are_hidden else Int8(0)

    def stored(self, element_size: int, int8: bool) -> dict[str, StoredTensor]:
        """Returns the tensors that ZeRO-3 shards for it, by name inside the layer."""
        if not self.lora:
            return {self.name: StoredTensor(self.shape, 4 if self.keep_fp32 else element_size)}
        tensors = self.format(int8).stored(self.matrix, element_size)
        return {f"{self.linear}.{tensor}": stored for tensor, stored in tensors.items()}

    def pieces(self, prefix: str, fused: bool = False, transposed: bool = False) -> Pieces | None:
        """Returns the tensors on disk, unless it is stored under its own name and shape.

        Args:
            prefix: of the layer's names.
            fused: stacks are on disk as transformers has them in memory, each in one tensor of three dimensions.
            transposed: as `fused`, and each expert's matrix is transposed.
        """
        if self.on_disk:
            return Pieces((prefix + self.on_disk,), self.shape)
        if self.stack is None:
            return None
        experts, (rows, columns) = self.matrices, self.matrix
        of_one = (self.stock_name,) if fused or transposed else self.stack.names
        if "{}" not in of_one[0]:
            return Pieces((prefix + of_one[0],), (experts, rows // experts, columns), transposed)
        names = tuple(prefix + name.format(i) for i in range(experts) for name in of_one)
        return Pieces(names, (rows // len(names), columns), transposed)


def cut(spec: TensorSpec, keep: LayerKeep) -> tuple[TensorSpec, Tensor]:
    """Returns the tensor that these groups leave, and its rows (or columns) that stay: ascending int64."""
    start, kept = 0, list[Tensor]()
    for span in spec.spans:
        kept.append(start + group_indices(keep[span.kind], span.width))
        start += span.size
    return spec.resized(keep.counts), torch.cat(kept) if kept else torch.arange(
        spec.shape[spec.axis]
    )


@dataclass(frozen=True)
class LayerSpec:
    """Describes a layer. Layers with the same tensors are one object."""

    layer_list: int  # 1 in a decoder after an encoder, else 0
    tensors: tuple[TensorSpec, ...]
    attributes: tuple[Attribute, ...] = ()

    @cached_property
    def counts(self) -> LayerCounts:
        """The groups of each kind that it has."""
        return LayerCounts(
            (span.kind, span.groups) for tensor in self.tensors for span in tensor.spans
        )

    @cached_property
    def ranges(self) -> Mapping[Kind, int]:
        """The equal ranges of the groups of each kind, which must lose the same number each."""
        return {span.kind: span.ranges for tensor in self.tensors for span in tensor.spans}

    @property
    def key_value_heads(self) -> int:
        """Their number, whether they or only their query heads may leave."""
        return self.ranges.get(QUERY_HEADS) or self.counts.get("heads", 0)

    @cached_property
    def linears(self) -> tuple[TensorSpec, ...]:
        """The weights with LoRA, in the order of the forward. Those that no cut makes smaller come last."""
        return tuple(tensor for tensor in self.tensors if tensor.lora)

    @property
    def others(self) -> list[TensorSpec]:
        """The tensors that are neither weights nor biases of these linears."""
        linears = {linear.linear for linear in self.linears}
        return [tensor for tensor in self.tensors if tensor.name.rpartition(".")[0] not in linears]

    @cached_property
    def group_numel(self) -> Mapping[Kind, int]:
        """The linear parameters that leave with one group, without biases."""
        sizes = [
            (x.kinds, x.group_width * x.numel // x.shape[x.axis]) for x in self.linears if x.spans
        ]
        return {kind: sum(size for kinds, size in sizes if kind in kinds) for kind in self.counts}

    @cached_property
    def numel(self) -> int:
        """The linear parameters that belong to groups. `prune.ratio` is a fraction of these."""
        return sum(count * self.group_numel[kind] for kind, count in self.counts.items())

    def lora_numel(self, rank: int) -> list[int]:
        """Returns the elements of A, then B, of each linear."""
        return [math.prod(shape) for linear in self.linears for shape in linear.lora_shapes(rank)]

    def shapes(self) -> dict[str, Shape]:
        return {tensor.name: tensor.shape for tensor in self.tensors}

    def resized(self, counts: LayerCounts) -> "LayerSpec":
        """Returns the layer with these counts of groups, some of which may be of kinds that it lacks."""
        return _resized(self, counts)

    def cuts(
        self, keep: LayerKeep, *, int8: bool = False
    ) -> Iterator[tuple[str, Slice, TensorSpec | None]]:
        """Yields the stored tensors that get smaller, apart from LoRA: name, slice that stays, and a weight's spec.

        Tensors that lose the same rows, such as k_proj and v_proj, share the tensor of indices. A linear that loses
        inputs keeps its full bias.
        """
        kept = dict[tuple[Span, ...], Tensor]()
        for spec in (x for x in self.tensors if x.shrinks(keep)):
            if spec.spans not in kept:
                kept[spec.spans] = cut(spec, keep)[1]
            for tensor, stays in spec.format(int8).kept(spec.axis, kept[spec.spans]).items():
                name = f"{spec.linear}.{tensor}" if spec.lora else spec.name
                yield (
                    name,
                    Slice(spec.axis, stays),
                    spec if spec.lora and tensor == WEIGHT else None,
                )


@lru_cache(1 << 12)
def _resized(layer: LayerSpec, counts: LayerCounts) -> LayerSpec:
    tensors = tuple(tensor.resized(counts) for tensor in layer.tensors)
    attributes = tuple(x._replace(span=x.span.resized(counts)) for x in layer.attributes)
    return replace(layer, tensors=tensors, attributes=attributes)
