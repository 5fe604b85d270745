"""Groups of a layer and the tensors that hold them.

A group is what one cut removes: a head, a channel, an expert. A layer is a list of tensors; this file says which rows
or columns belong to which group. The kinds of groups:

heads        One key-value head with all the query heads that read it. Under MHA it is one head.
query_heads  One query head, in models with one or two key-value heads. Key-value heads stay there, and each loses the
             same number of query heads.
channels     One MLP channel.
delta        One key head of a gated delta net with its value heads. Such layers have no attention.
experts      One expert of a mixture (experts.py).
cross_heads  One head of a decoder's attention to its encoder. Layers of the encoder have none.

A dense layer among sparse ones has heads and no experts. Its MLP is never cut. A layer of Mamba-2 alone has no groups.

A layer is a list of tensors. Along one axis a tensor is a sequence of spans, and a cut takes groups out of each span.
A span has all groups of one kind, one after another. Each group is `width` rows (or columns) wide. That covers separate
weights, fused ones (q|k|v, gate|up), biases, norms and stacks of experts:

    q_proj.weight     Span("heads", 8, 512)                                rows of 8 key-value heads, 4 query heads each
    o_proj.weight     Span("heads", 8, 512), axis 1                        the same groups, as columns
    qkv_proj.weight   Span("heads", 8, 512), Span("heads", 8, 128) twice    queries, keys and values in one tensor

A group leaves all tensors of its layer together. `kept_indices` are the rows that stay. The live cut, slices of files,
modules without weights, plans and exports all use it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from loraprune_ds.model.frozen import WEIGHT, Matrix, Pieces, Slice

Kind = str
QUERY_HEADS: Kind = "query_heads"
Shape = tuple[int, ...]
T = TypeVar("T")
# Settings that leave layers of one size.
EQUAL_LAYERS = "prune.ranking: uniform, prune.protected_first: 0 and prune.protected_last: 0"


class PerKind(dict[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. It is hashed, so it must not change."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class LayerCounts(PerKind[int]):
    """Holds the number of groups of each kind in one layer, 0 for a kind that the layer lacks."""


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
    ranges: int = 1  # equal parts of the groups. Each must lose the same number

    @property
    def size(self) -> int:
        return self.groups * self.width

    @property
    def score_shape(self) -> Shape:
        """The shape of what `fisher` keeps: one per group, or a matrix of second moments per range of query heads."""
        in_range = self.groups // self.ranges
        return (self.ranges, in_range, in_range) if self.kind == QUERY_HEADS else (self.groups,)

    @property
    def scores(self) -> int:
        return math.prod(self.score_shape)

    def resized(self, counts: Mapping[Kind, int]) -> Self:
        return self._replace(groups=counts[self.kind])


class Attribute(NamedTuple):
    """Names a count that the forward pass reads from a module or its config. It must follow a cut."""

    module: str  # path inside the layer
    name: str
    span: Span
    ranges: int = 1  # equal parts of the span. The count is the size of one

    def resized(self, counts: Mapping[Kind, int]) -> Self:
        return self._replace(span=self.span.resized(counts))


class StackSpec(NamedTuple):
    """Describes how one linear of all experts is stored, the experts one below the other (experts.py)."""

    # on disk: one expert's, with {} for its number, such as "mlp.experts.{}.up_proj.weight". Without {}: all experts'
    names: tuple[str, ...]
    reads_channels: bool  # the inputs are an expert's channels, not the hidden states
    transposed: bool = False  # the rows of an expert are its inputs


@dataclass(frozen=True)
class TensorSpec:
    """Describes one tensor of a layer."""

    name: str  # inside the layer, as in transformers' modules
    spans: tuple[Span, ...] = ()  # along `axis`. A tensor without spans keeps its size
    axis: int = 0
    lora: bool = False
    stack: StackSpec | None = None
    on_disk: str | None = None  # the name in weight files, if it differs
    keep_fp32: bool = False  # fp32 in every model
    shape: Shape = ()

    @property
    def linear(self) -> str:
        """The name of a weight's module."""
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
        """The number of experts in a stack, otherwise 1."""
        return self.spans[0].groups if self.stack else 1

    @property
    def group_width(self) -> int:
        """The rows (axis 0) or columns (axis 1) of one group."""
        return sum(span.width for span in self.spans)

    @property
    def loses_inputs(self) -> bool:
        """True if a cut takes inputs, as from o_proj and down_proj. Never true for a stack of experts."""
        return bool(self.spans) and self.axis == 1

    @property
    def reads_groups(self) -> bool:
        """True if the inputs are groups, or channels of an expert. A mask on these inputs masks the groups."""
        return self.stack.reads_channels if self.stack else self.loses_inputs

    @property
    def inputs(self) -> int:
        """The inputs of a linear. In a stack: the inputs of one expert."""
        if self.stack and self.stack.transposed:
            return self.shape[0] // self.matrices
        return self.shape[1]

    def lora_shapes(self, rank: int) -> tuple[Matrix, Matrix]:
        """Returns the shapes of A (r, in_features) and B (out_features, r). A stack has one A per expert."""
        outputs, inputs = self.matrix
        return (self.matrices * rank, inputs), (outputs, rank)

    def lora_cuts(self, rank: int, kept: Tensor, keep: LayerKeep) -> list[tuple[int, Slice]]:
        """Lists the LoRA factors that a cut makes smaller, 0 for A or 1 for B, each with the slice that stays.

        Args:
            kept: the rows (or columns) of the weight that stay.
        """
        weight = Slice(self.axis, kept)
        if self.stack:
            experts = keep[self.spans[0].kind]
            return [(0, Slice(0, group_indices(experts, rank))), (1, weight)]
        return [(1 - self.axis, weight)]  # A has the inputs, B the outputs

    def shrinks(self, keep: LayerKeep) -> bool:
        """True if some groups of this tensor leave."""
        return any(len(keep[span.kind]) < span.groups for span in self.spans)

    def kept_indices(self, keep: LayerKeep) -> Tensor:
        """Returns the rows (axis 0) or columns (axis 1) that stay, (kept,) int64, ascending. The tensor has spans."""
        start = 0
        kept: list[Tensor] = []
        for span in self.spans:
            kept.append(start + group_indices(keep[span.kind], span.width))
            start += span.size
        return torch.cat(kept)

    def resized(self, counts: Mapping[Kind, int]) -> "TensorSpec":
        """Returns the tensor with these counts of groups."""
        if not self.spans:
            return self
        spans = tuple(span.resized(counts) for span in self.spans)
        shape = list(self.shape)
        shape[self.axis] = sum(span.size for span in spans)
        return replace(self, spans=spans, shape=tuple(shape))

    def stored_name(self, tensor: str) -> str:
        """Returns the name inside the layer of one tensor of a linear's storage format, WEIGHT or SCALE."""
        return f"{self.linear}.{tensor}"

    def pieces(self, prefix: str, fused: bool = False, transposed: bool = False) -> Pieces | None:
        """Returns the tensors on disk, or None if it is one tensor with the same name and shape.

        Args:
            prefix: start of the layer's names, such as "model.layers.0.".
            fused: each stack is one tensor of three dimensions on disk, as in transformers' modules.
            transposed: as `fused`, and each expert's matrix is transposed.
        """
        if self.on_disk:
            return Pieces((prefix + self.on_disk,), self.shape)
        if self.stack is None:
            return None
        rows, columns = self.matrix
        templates = (self.stock_name,) if fused or transposed else self.stack.names
        if "{}" not in templates[0]:
            shape = (self.matrices, rows // self.matrices, columns)
            return Pieces((prefix + templates[0],), shape, transposed)
        experts = range(self.matrices)
        names = [prefix + template.format(i) for i in experts for template in templates]
        return Pieces(tuple(names), (rows // len(names), columns), transposed)


@dataclass(frozen=True)
class LayerSpec:
    """Describes a layer. Layers with the same tensors are one object."""

    layer_list: int  # 1 in a decoder after an encoder, otherwise 0
    tensors: tuple[TensorSpec, ...]
    attributes: tuple[Attribute, ...] = ()

    @property
    def spans(self) -> list[Span]:
        return [span for tensor in self.tensors for span in tensor.spans]

    @cached_property
    def counts(self) -> LayerCounts:
        """The number of groups of each kind in this layer."""
        return LayerCounts((span.kind, span.groups) for span in self.spans)

    @cached_property
    def ranges(self) -> Mapping[Kind, int]:
        """The number of equal ranges of each kind's groups. Each range must lose the same number."""
        return {span.kind: span.ranges for span in self.spans}

    @property
    def key_value_heads(self) -> int:
        """The number of key-value heads, also where only their query heads may leave."""
        return self.ranges.get(QUERY_HEADS) or self.counts.get("heads", 0)

    @cached_property
    def linears(self) -> tuple[TensorSpec, ...]:
        """The weights with LoRA, in the order of the forward. Weights of constant size come last."""
        return tuple(tensor for tensor in self.tensors if tensor.lora)

    @property
    def others(self) -> list[TensorSpec]:
        """The tensors other than the weights and biases of `linears`."""
        linears = {linear.linear for linear in self.linears}
        return [tensor for tensor in self.tensors if tensor.name.rpartition(".")[0] not in linears]

    @cached_property
    def group_numel(self) -> Mapping[Kind, int]:
        """The linear parameters that leave with one group, without biases."""
        numel = dict.fromkeys(self.counts, 0)
        for linear in self.linears:
            of_group = linear.group_width * linear.numel // linear.shape[linear.axis]
            for kind in linear.kinds:
                numel[kind] += of_group
        return numel

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
        """Returns the layer with these counts of groups. Kinds that the layer lacks are ignored."""
        return _resized(self, counts)

    def cuts(self, keep: LayerKeep) -> Iterator[tuple[TensorSpec, Slice]]:
        """Yields the tensors that get smaller, apart from LoRA, each with the slice that stays.

        Tensors that lose the same rows, such as k_proj and v_proj, share the tensor of indices. A linear that loses
        inputs keeps its full bias.
        """
        kept_by_spans: dict[tuple[Span, ...], Tensor] = {}
        for spec in self.tensors:
            if not spec.shrinks(keep):
                continue
            if spec.spans not in kept_by_spans:
                kept_by_spans[spec.spans] = spec.kept_indices(keep)
            yield spec, Slice(spec.axis, kept_by_spans[spec.spans])


@lru_cache(1 << 12)
def _resized(layer: LayerSpec, counts: LayerCounts) -> LayerSpec:
    tensors = tuple(tensor.resized(counts) for tensor in layer.tensors)
    attributes = tuple(attribute.resized(counts) for attribute in layer.attributes)
    return replace(layer, tensors=tensors, attributes=attributes)
