"""The sizes of a model: its layers, each a list of tensors, and the parameters outside. Also the cache of a token."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from loraprune_ds.files import JsonObject
from loraprune_ds.model.families.base import Attention, Family, Mixture
from loraprune_ds.model.family import FAMILIES, family_name
from loraprune_ds.model.frozen import Pieces
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
    """Names a linear with LoRA by its layer and its name inside the layer."""

    layer: int
    name: str


FIRST = "loraprune_first"  # field of an export's config.json: the dense model that it was cut from
LayerLinear = tuple[int, TensorSpec]  # a linear with LoRA, after the number of its layer


@dataclass(frozen=True)
class ModelShape:
    """Holds the sizes of a model of a family."""

    model_type: str
    # of groups. All masks, draws and files have this order. The last kind is the finest
    kinds: tuple[Kind, ...]
    layers: tuple[LayerSpec, ...]  # an encoder's before its decoder's
    outer: tuple[TensorSpec, ...]  # outside the layers: embedding, final norm, untied head
    # transformers' config object of layer 0, with the counts of the source
    config: Any = field(compare=False)

    @property
    def family(self) -> Family:
        return FAMILIES[family_name(self.model_type)]

    @property
    def first(self) -> JsonObject:
        """The first dense model of a chain of runs, if this one is an export. Otherwise this one, without a name."""
        own = {"parameters": self.total_numel(), "linear_parameters": self.linear_numel()}
        return getattr(self.config, FIRST, own)

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
        if "experts" not in self.kinds:
            return None
        return self.family.mixture(self.config)

    @property
    def tie_word_embeddings(self) -> bool:
        return all(tensor.name != "lm_head.weight" for tensor in self.outer)

    @cached_property
    def counts(self) -> tuple[LayerCounts, ...]:
        """The number of groups of each kind in each layer, 0 for a kind that the layer lacks."""
        return tuple(
            LayerCounts((kind, layer.counts.get(kind, 0)) for kind in self.kinds)
            for layer in self.layers
        )

    def times(self, layer: int, kind: Kind) -> int:
        """Returns the factor from the count in config.json to the number of groups in this layer."""
        return self.family.times(self.config, layer, kind)

    @property
    def is_uniform(self) -> bool:
        """True if all layers with groups of a kind have the same number. A stock model class can then hold them."""
        return self.family.is_uniform(self.config, self.layers)

    @cached_property
    def layer_lists(self) -> list[range]:
        """The layers of a decoder, or of an encoder and its decoder."""
        numbers = [layer.layer_list for layer in self.layers]  # ascending
        lists = range(len(self.family.layer_lists))
        return [range(bisect_left(numbers, i), bisect_right(numbers, i)) for i in lists]

    def prefix(self, layer: int) -> str:
        """Returns the start of a layer's parameter names, such as "model.layers.0."."""
        number = self.layers[layer].layer_list
        path = self.family.layer_lists[number].path
        return f"{path}.{layer - self.layer_lists[number].start}."

    @property
    def attention(self) -> list[Attention]:
        """The costs of attention in each layer."""
        return [self.family.attention(self.config, layer) for layer in self.layers]

    def linears(self, layers: Iterable[int] | None = None) -> list[LayerLinear]:
        """Lists the linears with LoRA of these or all layers, each with the number of its layer."""
        if layers is None:
            layers = range(len(self.layers))
        return [(i, linear) for i in layers for linear in self.layers[i].linears]

    def input_linears(self, layers: Iterable[int] | None = None) -> list[LayerLinear]:
        """Lists the linears whose inputs are groups, like o_proj and down_proj."""
        return [(i, linear) for i, linear in self.linears(layers) if linear.reads_groups]

    def linear(self, linear_id: LinearId) -> TensorSpec:
        """Returns the weight of a linear."""
        return next(x for x in self.layers[linear_id.layer].linears if x.linear == linear_id.name)

    @property
    def biases(self) -> frozenset[str]:
        """The linears that have a bias in some layer."""
        names = {tensor.name for _, tensor in self.tensors()}
        linears = {linear.linear for _, linear in self.linears()}
        return frozenset(linear for linear in linears if f"{linear}.bias" in names)

    def tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        """Yields all parameters, each with the prefix of its layer's names. A tied head is the embedding."""
        embedding, *rest = self.outer
        yield "", embedding
        for i, layer in enumerate(self.layers):
            for tensor in layer.tensors:
                yield self.prefix(i), tensor
        for tensor in rest:
            yield "", tensor

    def parameters(self) -> dict[str, Shape]:
        """Returns the shapes of all parameters by their names in the weight files."""
        return {prefix + tensor.name: tensor.shape for prefix, tensor in self.tensors()}

    def pieces(self, fused: bool = False, transposed: bool = False) -> dict[str, Pieces]:
        """Returns the tensors on disk of each parameter that has another name or shape there (`TensorSpec.pieces`)."""
        return {
            prefix + tensor.name: pieces
            for prefix, tensor in self.tensors()
            if (pieces := tensor.pieces(prefix, fused, transposed))
        }

    @property
    def shared_tensors(self) -> dict[str, str]:
        """Maps copies of a bias to the one in the first layer of their encoder or decoder. Files hold only that one."""
        copies: dict[str, str] = {}
        if self.family.shares_bias(self.config, self.layers):
            bias = self.family.shared_bias
            for first, *others in self.layer_lists:
                for layer in others:
                    copies[f"{self.prefix(layer)}{bias}"] = f"{self.prefix(first)}{bias}"
        return copies

    def total_numel(self) -> int:
        return sum(tensor.numel for _, tensor in self.tensors())

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
        """Returns the equal ranges of groups that must lose the same number each, a common multiple of the layers'."""
        return math.lcm(*(layer.ranges.get(kind, 1) for layer in self.layers))

    def has_heads_for(self, gpus: int) -> bool:
        """True if the GPUs of a server can divide the key-value heads, or repeat each equally often."""
        heads = [layer.ranges[QUERY_HEADS] for layer in self.layers if QUERY_HEADS in layer.ranges]
        return all(max(count, gpus) % min(count, gpus) == 0 for count in heads)

    def resized(self, counts: Sequence[LayerCounts]) -> "ModelShape":
        """Returns the model with these counts of groups in each layer."""
        pairs = zip(self.layers, counts, strict=True)
        layers = [layer.resized(layer_counts) for layer, layer_counts in pairs]
        return replace(self, layers=tuple(layers))

    def after(self, keep: Sequence[LayerKeep]) -> "ModelShape":
        return self.resized([layer_keep.counts for layer_keep in keep])

    def only(self, layers: Sequence[int]) -> "ModelShape":
        """Returns a model of these layers, numbered from 0."""
        return replace(self, layers=tuple(self.layers[i] for i in layers))


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers.

    An encoder-decoder counts one token of the encoder and one of the decoder.
    """
    return sum(attention.cached for attention in shape.attention)


def state_numel(shape: ModelShape) -> int:
    """Counts the elements of the states of delta nets and Mamba-2, which have no KV cache. They are fp32."""
    return sum(attention.state for attention in shape.attention)
