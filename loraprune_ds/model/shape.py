"""The sizes of a model: its layers, each a list of tensors, and the parameters outside of them. And a token's cost."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from loraprune_ds.model.families.base import Attention, Family, Mixture
from loraprune_ds.model.family import FAMILIES, family_name
from loraprune_ds.model.frozen import Pieces, StoredTensor
from loraprune_ds.model.groups import (
    QUERY_HEADS,
    Kind,
    LayerCounts,
    LayerKeep,
    LayerSpec,
    Shape,
    TensorSpec,
)


class LinearId(NamedTuple):
    """Names a linear with LoRA: its layer, and its name inside it."""

    layer: int
    name: str


@dataclass(frozen=True)
class ModelShape:
    """Holds the sizes of a model of a family."""

    model_type: str
    # of groups, in the order of all masks, draws and files. The last is the finest
    kinds: tuple[Kind, ...]
    layers: tuple[LayerSpec, ...]  # of an encoder before those of its decoder
    outer: tuple[TensorSpec, ...]  # outside the layers: embedding, final norm, untied head
    # transformers' object of layer 0, with the counts of the source
    config: Any = field(compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[family_name(self.model_type)]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def head_dim(self) -> int:
        return self.family.head_dim(self.config)

    @property
    def mixture(self) -> Mixture | None:
        return self.family.mixture(self.config) if "experts" in self.kinds else None

    @property
    def tie_word_embeddings(self) -> bool:
        return all(tensor.name != "lm_head.weight" for tensor in self.outer)

    @cached_property
    def counts(self) -> tuple[LayerCounts, ...]:
        """The groups of each layer, 0 of a kind that it lacks."""
        return tuple(
            LayerCounts((kind, layer.counts.get(kind, 0)) for kind in self.kinds)
            for layer in self.layers
        )

    def times(self, layer: int, kind: Kind) -> int:
        """Counts the groups of a layer for each that config.json says it has."""
        return self.family.times(self.config, layer, kind)

    @property
    def is_uniform(self) -> bool:
        """True if all layers with groups of a kind have the same number, so that a stock model class can hold them."""
        return self.family.is_uniform(self.config, self.layers)

    @cached_property
    def layer_lists(self) -> list[range]:
        """The layers of a decoder, or of an encoder and its decoder."""
        sizes = [
            sum(layer.layer_list == n for layer in self.layers)
            for n in range(len(self.family.layer_lists))
        ]
        return [range(*pair) for pair in pairwise([0, *accumulate(sizes)])]

    def prefix(self, layer: int) -> str:
        """Returns how the names of a layer's parameters begin."""
        place = self.layers[layer].layer_list
        return f"{self.family.layer_lists[place].path}.{layer - self.layer_lists[place].start}."

    @property
    def attention(self) -> list[Attention]:
        """The costs of attention in each layer."""
        return [self.family.attention(self.config, layer) for layer in self.layers]

    def linears(self, layers: Iterable[int] | None = None) -> list[tuple[int, TensorSpec]]:
        """Lists the linears with LoRA of these layers or all, with the numbers of their layers."""
        layers = range(len(self.layers)) if layers is None else layers
        return [(i, linear) for i in layers for linear in self.layers[i].linears]

    def input_linears(self, layers: Iterable[int] | None = None) -> list[tuple[int, TensorSpec]]:
        """Lists the linears that read groups, like o_proj and down_proj. To mask their inputs is to mask the groups."""
        return [
            (i, x)
            for i, x in self.linears(layers)
            if x.loses_inputs or (x.stack and x.stack.reads_channels)
        ]

    def linear(self, linear_id: LinearId) -> TensorSpec:
        """Returns the weight of a linear."""
        return next(x for x in self.layers[linear_id.layer].linears if x.linear == linear_id.name)

    @property
    def biases(self) -> frozenset[str]:
        """The linears that have a bias in some layer."""
        names = {tensor.name for layer in self.layers for tensor in layer.tensors}
        return frozenset(
            x.linear for layer in self.layers for x in layer.linears if f"{x.linear}.bias" in names
        )

    def tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yields all parameters, each with the prefix of its layer's names. A tied head is the embedding."""
        embedding, *rest = self.outer
        yield "", embedding
        for i, layer in enumerate(self.layers):
            yield from ((self.prefix(i), tensor) for tensor in layer.tensors)
        yield from (("", tensor) for tensor in rest)

    def parameters(self) -> dict[str, Shape]:
        """Returns the shapes of all parameters by their names in the weight files."""
        return {prefix + tensor.name: tensor.shape for prefix, tensor in self.tensors()}

    def pieces(self, fused: bool = False, transposed: bool = False) -> dict[str, Pieces]:
        """Returns the tensors on disk of each parameter that has another name or shape there (`TensorSpec.pieces`)."""
        found = (
            (prefix + x.name, x.pieces(prefix, fused, transposed)) for prefix, x in self.tensors()
        )
        return {name: pieces for name, pieces in found if pieces}

    @property
    def shared_tensors(self) -> dict[str, str]:
        """Maps names of parameters to the one of their encoder or decoder that files hold for all."""
        shared = self.family.shares_bias(self.config, self.layers)
        bias, lists = self.family.shared_bias, self.layer_lists if shared else []
        return {
            f"{self.prefix(i)}{bias}": f"{self.prefix(x[0])}{bias}" for x in lists for i in x[1:]
        }

    def stored(self, element_size: int, *, int8: bool) -> dict[str, StoredTensor]:
        """Returns the frozen tensors that ZeRO-3 shards, by name."""
        stored = ((prefix, x.stored(element_size, int8)) for prefix, x in self.tensors())
        return {
            prefix + name: tensor for prefix, of_one in stored for name, tensor in of_one.items()
        }

    def total_numel(self) -> int:
        return sum(tensor.numel for layer in self.layers for tensor in layer.tensors) + sum(
            x.numel for x in self.outer
        )

    def linear_numel(self) -> int:
        """Counts the linear parameters that belong to groups, without biases."""
        return sum(layer.numel for layer in self.layers)

    @cached_property
    def group_numel(self) -> Mapping[Kind, int]:
        """The linear parameters that leave with one group of each kind, without biases."""
        return {
            kind: max(layer.group_numel.get(kind, 0) for layer in self.layers)
            for kind in self.kinds
        }

    def lora_numel(self, rank: int) -> list[int]:
        """Returns the elements of A, then B, of each linear."""
        return [numel for layer in self.layers for numel in layer.lora_numel(rank)]

    def ranges(self, kind: Kind) -> int:
        """Counts the equal ranges of groups that must lose the same number each, or a multiple that fits all layers."""
        return math.lcm(*(layer.ranges.get(kind, 1) for layer in self.layers))

    def has_heads_for(self, gpus: int) -> bool:
        """True if GPUs of a server can divide the key-value heads that stay, or repeat each equally often."""
        heads = [layer.ranges[QUERY_HEADS] for layer in self.layers if QUERY_HEADS in layer.ranges]
        return all(max(count, gpus) % min(count, gpus) == 0 for count in heads)

    def resized(self, counts: Sequence[LayerCounts]) -> "ModelShape":
        """Returns the model with these groups."""
        layers = zip(self.layers, counts, strict=True)
        return replace(self, layers=tuple(layer.resized(own) for layer, own in layers))

    def after(self, keep: Sequence[LayerKeep]) -> "ModelShape":
        return self.resized([layer_keep.counts for layer_keep in keep])

    def only(self, layers: Sequence[int]) -> "ModelShape":
        """Returns a model of these layers, which count from 0 there."""
        return replace(self, layers=tuple(self.layers[i] for i in layers))


# What a token costs. An operation is a multiply or an add


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token uses: all, but only its chosen experts."""
    chosen = shape.mixture.experts_per_token if shape.mixture else 0
    idle = sum(max(0, counts.get("experts", 0) - chosen) for counts in shape.counts)
    tensors = (tensor for layer in shape.layers for tensor in layer.tensors)
    # some have no LoRA
    linears = (x for x in tensors if x.lora or (len(x.shape) > 1 and not x.spans))
    return sum(linear.numel for linear in linears) - (
        idle * shape.group_numel["experts"] if idle else 0
    )


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers.

    With an encoder it counts one token of the encoder and one of the decoder.
    """
    return sum(attention.cached for attention in shape.attention)


def state_numel(shape: ModelShape) -> int:
    """Counts the elements of the states of delta nets and Mamba-2, which have no KV cache. They are fp32."""
    return sum(attention.state for attention in shape.attention)


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one attention product in all layers, over the full window.

    A delta net multiplies its state three times: by the key (Mamba-2: by a decay), by the query, and to add
    the value. That equals two products over half a window here.
    """
    return 2 * sum(attention.width for attention in shape.attention) * window + 6 * state_numel(
        shape
    )


def needed_flops_per_token(shape: ModelShape, window: float) -> float:
    """Returns the operations that training needs per token. The utilisation of a GPU (MFU) counts these.

    A frozen weight takes two passes: the output and the gradient of the input. Attention takes six products, over half
    a window on average (PaLM, arXiv 2204.02311, appendix B). Scoring and recomputation do not count, nor do
    LoRA's own products, which are below 1 %.

    Args:
        window: the tokens that attention covers. The mean over all tokens if texts differ.
    """
    # the head is one more linear
    frozen = active_numel(shape) + shape.vocab_size * shape.hidden_size
    # a token is in one
    return (4 * frozen + 6 * attention_product(shape, window) / 2) / len(shape.layer_lists)
