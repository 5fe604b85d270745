"""The sizes of the network: what a decoder layer holds, how wide it is, and all other parameters."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Self, TypeVar

import torch
from torch import Tensor

from loraprune_ds.model.family import FAMILIES, family_name
from loraprune_ds.model.family_row import Companion, Family, Kind, Linear, LinearId, Part, Width
from loraprune_ds.model.frozen import Matrix, Pieces

T = TypeVar("T")
# Settings that leave layers of one size.
EQUAL_LAYERS = "prune.ranking: uniform, prune.protected_first: 0 and prune.protected_last: 0"


class PerKind(dict[Kind, T]):
    """Holds one value for each kind, such as `heads=4, channels=37`. Must not change: it is hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


class LayerShape(PerKind[int]):
    """Holds the counts of groups of one decoder layer, which pruning changes. 0 of a kind that this layer lacks."""

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of which the layer has groups."""
        return frozenset(kind for kind, count in self.items() if count)


class LayerTensors(PerKind[Tensor]):
    """Holds one value for every group of a decoder layer: (groups,) for each kind."""

    def select(self, keep: "LayerKeep") -> Self:
        return type(self)((kind, values[keep[kind]]) for kind, values in self.items())


class LayerKeep(LayerTensors):
    """Names the groups that stay in one decoder layer: ascending int64 indices into its current groups."""

    @property
    def shape(self) -> LayerShape:
        return LayerShape((kind, len(groups)) for kind, groups in self.items())


Sizes = Mapping[str, tuple[int, ...]]  # shapes by name


@dataclass(frozen=True)
class ModelShape:
    """Holds all sizes that matter to pruning, under the names of the Hugging Face config where it has them."""

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_group: int  # num_attention_heads / num_key_value_heads, the same in every layer. All, if heads stay
    vocab_size: int
    tie_word_embeddings: bool
    layers: tuple[LayerShape, ...]
    biases: frozenset[str] = frozenset()  # names of the linears that have a bias, the same in every layer
    # The linears of each layer that are whole, by name inside it, and the other parameters that no cut makes smaller.
    whole: Mapping[int, Mapping[str, Matrix]] = field(default_factory=dict[int, Mapping[str, Matrix]], hash=False)
    layer_others: Mapping[int, Sizes] = field(default_factory=dict[int, Sizes], hash=False)
    # The parameters outside the layers: embedding, final norm, untied head.
    outer_parameters: Sizes = field(default_factory=dict[str, tuple[int, ...]], hash=False)
    expert_size: int = 0  # channels of one expert
    experts_per_token: int = 0
    least_experts: int = 0  # the router needs this many
    expert_groups: int = 1  # groups of experts, of equal size, that the router chooses from
    # Names of linears and companions of the family that each layer list lacks.
    absent: tuple[frozenset[str], ...] = (frozenset(),)
    shared_heads: int = field(default=0, compare=False)  # the heads of the source, whose layers share one bias
    encoder_layers: int = 0  # the first of `layers` are an encoder's, its decoder's follow
    doubled: frozenset[int] = frozenset()  # layers that have twice the channels that config.json says
    widths: Mapping[Width, int] = field(default_factory=dict[Width, int], hash=False)  # of the family's `widths`

    @property
    def family(self) -> Family:
        return FAMILIES[family_name(self.model_type)]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of groups, in the order of all masks, draws and files."""
        return tuple(kind for kind in self.family.kinds if kind in self.layers[0])

    @property
    def layer_lists(self) -> list[range]:
        """The layers of a decoder, or of an encoder and its decoder."""
        ends = sorted({0, self.encoder_layers, len(self.layers)})
        return [range(*pair) for pair in pairwise(ends)]

    def layer_list(self, layer: int) -> int:
        """Returns 1 for a layer of a decoder after an encoder, otherwise 0."""
        return int(0 < self.encoder_layers <= layer)

    def prefix(self, layer: int) -> str:
        """Returns how the names of a layer's parameters begin."""
        place = self.layer_list(layer)
        return f"{self.family.layer_lists[place].path}.{layer - place * self.encoder_layers}."

    def linears(self, layer: int) -> tuple[Linear, ...]:
        """Returns the LoRA-adapted linears of a decoder layer, in the order of its forward."""
        kinds, whole, absent = self.layers[layer].kinds, self.whole.get(layer, {}), self.absent[self.layer_list(layer)]
        cut = (x for x in self.family.linears if x.kind in kinds and x.name not in absent)
        return (*cut, *(x for x in self.family.linears if x.name in whole))

    def companions(self, layer: int) -> tuple[Companion, ...]:
        kinds, absent = self.layers[layer].kinds, self.absent[self.layer_list(layer)]
        return tuple(x for x in self.family.companions if x.parts[0].kind in kinds and x.name not in absent)

    def others(self, layer: int) -> Sizes:
        """Returns the parameters of this layer that no cut makes smaller, by name inside it."""
        return self.layer_others.get(layer, {})

    def linear_ids(self, layers: Iterable[int] | None = None) -> list[LinearId]:
        layers = range(len(self.layers)) if layers is None else layers
        return [LinearId(i, linear) for i in layers for linear in self.linears(i)]

    def input_linear_ids(self, layers: Iterable[int] | None = None) -> list[LinearId]:
        """Lists the linears whose inputs belong to groups, such as o_proj and down_proj."""
        return [linear_id for linear_id in self.linear_ids(layers) if linear_id.linear.reads_groups]

    def width(self, width: Width) -> int:
        """Returns the rows that `width` stands for."""
        per_width: dict[Width, int] = {
            "queries": self.head_dim * self.queries_per_group,
            "head": self.head_dim,
            "query_count": self.queries_per_group,
            "one": 1,
            "hidden": self.hidden_size,
            "expert": self.expert_size,
            "gate_up": 2 * self.expert_size,
            **self.widths,
        }
        return per_width[width]

    def group_width(self, linear: Linear) -> int:
        """Counts the rows (axis 0) or columns (axis 1) of `linear` that belong to one group."""
        return sum(self.width(part.width) for part in linear.parts)

    def part_sizes(self, layer: int, parts: tuple[Part, ...]) -> list[int]:
        return [self.layers[layer][part.kind] * self.width(part.width) for part in parts]

    def query_heads(self, layer: LayerShape) -> int:
        return layer.get("heads", 1) * self.queries_per_group

    def times(self, layer: int, kind: Kind) -> int:
        """Counts the groups of a layer for each that config.json says it has."""
        return 2 if kind == "channels" and layer in self.doubled else 1

    @property
    def counted(self) -> list[LayerShape]:
        """The counts of groups of each layer, as config.json says them."""
        layers = enumerate(self.layers)
        return [LayerShape((kind, count // self.times(i, kind)) for kind, count in x.items()) for i, x in layers]

    def kept_indices(self, layer: int, parts: tuple[Part, ...], keep: LayerKeep) -> Tensor:
        """Returns the rows (or columns) that stay along the axis of these parts, ascending int64."""
        offset, kept = 0, list[Tensor]()
        for part, size in zip(parts, self.part_sizes(layer, parts), strict=True):
            kept.append(offset + group_indices(keep[part.kind], self.width(part.width)))
            offset += size
        return torch.cat(kept)

    def linear_shape(self, layer: int, linear: Linear) -> tuple[int, int]:
        """Returns (out_features, in_features) of a linear at this layer's current width."""
        if not linear.parts:
            return self.whole[layer][linear.name]
        width, across = sum(self.part_sizes(layer, linear.parts)), self.width(linear.across)
        return (width, across) if linear.axis == 0 else (across, width)

    def lora_shapes(self, layer: int, linear: Linear, lora_rank: int) -> tuple[Matrix, Matrix]:
        """Returns the shapes of A (r, in_features) and B (out_features, r). A stack has one A per expert."""
        out_features, in_features = self.linear_shape(layer, linear)
        experts = self.layers[layer][linear.kind] if linear.is_stack else 1
        return (experts * lora_rank, in_features), (out_features, lora_rank)

    def lora_sizes(self, lora_rank: int) -> list[int]:
        return [numel for i in range(len(self.layers)) for numel in self.layer_lora_sizes(i, lora_rank)]

    def layer_lora_sizes(self, layer: int, lora_rank: int) -> list[int]:
        """Returns the elements of A, then B, of each linear of one layer."""
        return [math.prod(shape) for x in self.linears(layer) for shape in self.lora_shapes(layer, x, lora_rank)]

    @cached_property
    def _group_numel(self) -> Mapping[Kind, int]:
        numel = Counter[Kind]()
        for absent in self.absent:  # what stands in encoder and decoder has one size
            of_list = Counter[Kind]()
            for x in (x for x in self.family.linears if x.name not in absent):
                of_list[x.kind] += self.group_width(x) * self.width(x.across)
            numel |= of_list
        return numel

    def group_numel(self, kind: Kind) -> int:
        """Counts the linear parameters that leave with one group, without biases."""
        return self._group_numel[kind]

    def numel_of(self, counts: Mapping[Kind, int]) -> int:
        """Counts the linear parameters of a layer with these counts of groups, without biases."""
        return sum(count * self.group_numel(kind) for kind, count in counts.items())

    def layer_numel(self, layer: int) -> int:
        """Counts the linear parameters of one decoder layer. `prune.ratio` is a fraction of these."""
        return self.numel_of(self.layers[layer])

    def linear_numel(self) -> int:
        return sum(map(self.numel_of, self.layers))

    def inputs(self, layer: int, linear: Linear) -> int:
        """Counts the inputs of a linear, or of one expert's."""
        return self.width(linear.expert_inputs) if linear.is_stack else self.linear_shape(layer, linear)[1]

    def inputs_per_token(self, layer: int, linear: Linear) -> int:
        """Counts the numbers that enter a linear for one token, which may choose several experts."""
        return self.inputs(layer, linear) * (self.experts_per_token if linear.is_stack else 1)

    def total_numel(self) -> int:
        return sum(map(math.prod, self.parameters().values()))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of all parameters, as in the weight files. A tied head is the embedding."""
        embedding, *rest = self.outer_parameters.items()
        shapes = dict([embedding])
        for layer in range(len(self.layers)):
            shapes |= self.layer_parameters(layer)
        return shapes | dict(rest)

    def layer_parameters(self, layer: int) -> dict[str, tuple[int, ...]]:
        prefix = self.prefix(layer)
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears(layer):
            out_features, in_features = self.linear_shape(layer, linear)
            shapes[f"{prefix}{linear.name}.weight"] = (out_features, in_features)
            if linear.name in self.biases:
                shapes[f"{prefix}{linear.name}.bias"] = (out_features,)
        for companion in self.companions(layer):
            sizes = list(map(self.width, companion.across))
            sizes.insert(companion.axis, sum(self.part_sizes(layer, companion.parts)))
            shapes[f"{prefix}{companion.name}"] = tuple(sizes)
        return shapes | {f"{prefix}{name}": size for name, size in self.others(layer).items()}

    def pieces(self, fused: bool = False, transposed: bool = False) -> dict[str, Pieces]:
        """Returns the tensors on disk of each parameter that is not stored under its own name and shape.

        Args:
            fused: the stacks are on disk as transformers has them in memory, each in one tensor of three dimensions.
            transposed: as `fused`, and each expert's matrix is transposed.
        """
        pieces: dict[str, Pieces] = {}
        for i, layer in enumerate(self.layers):
            prefix, shapes = self.prefix(i), self.layer_parameters(i)
            for linear in (x for x in self.linears(i) if x.is_stack):
                name, experts = f"{prefix}{linear.name}.weight", layer[linear.kind]
                rows, columns = shapes[name]
                on_disk = (f"{linear.name}_proj",) if fused or transposed else linear.on_disk
                names, shape = tuple(prefix + x for x in on_disk), (experts, rows // experts, columns)
                if "{}" in names[0]:
                    names = tuple(x.format(expert) for expert in range(experts) for x in names)
                    shape = (rows // len(names), columns)
                pieces[name] = Pieces(names, shape, transposed)
            for companion in (x for x in self.companions(i) if x.on_disk):
                name = prefix + companion.name
                pieces[name] = Pieces((f"{prefix}{companion.on_disk}",), shapes[name])
        return pieces

    @property
    def keep_fp32(self) -> frozenset[str]:
        """Names of the parameters that are fp32 in every model."""
        layers = range(len(self.layers))
        return frozenset(f"{self.prefix(i)}{x.name}" for i in layers for x in self.companions(i) if x.keep_fp32)

    def parts_of(self, kind: Kind) -> int:
        """Counts the equal ranges of a layer's groups that must lose the same number each."""
        return self.expert_groups if kind == "experts" else 1

    def cut_kinds(self, layer: int, keep: LayerKeep) -> list[Kind]:
        """Returns the kinds of which the layer loses groups."""
        return [kind for kind in self.kinds if len(keep[kind]) < self.layers[layer][kind]]

    def cut_linears(self, layer: int, keep: LayerKeep) -> list[Linear]:
        kinds = self.cut_kinds(layer, keep)
        return [linear for linear in self.linears(layer) if linear.kind in kinds]

    def after(self, keep: Sequence[LayerKeep]) -> "ModelShape":
        return self.with_layers(tuple(layer_keep.shape for layer_keep in keep))

    def with_layers(self, layers: tuple[LayerShape, ...]) -> "ModelShape":
        """Returns the shape with these groups."""
        return replace(self, layers=layers)

    def only(self, layers: Sequence[int]) -> "ModelShape":
        """Returns the shape of a model of these layers, which count from 0 there."""
        return replace(
            self,
            layers=tuple(self.layers[i] for i in layers),
            whole={n: self.whole.get(i, {}) for n, i in enumerate(layers)},
            layer_others={n: self.others(i) for n, i in enumerate(layers)},
            doubled=frozenset(n for n, i in enumerate(layers) if i in self.doubled),
            encoder_layers=sum(i < self.encoder_layers for i in layers),
        )

    @property
    def is_uniform(self) -> bool:
        """True if all layers with groups of a kind have the same number, so that a stock model class can hold them."""
        counts = defaultdict[Kind, set[int]](set)
        for kind in self.kinds:
            counts[self.family.as_many.get(kind, kind)] |= {layer[kind] for layer in self.counted} - {0}
        return all(len(found) <= 1 for found in counts.values())

    @property
    def shares_bias(self) -> bool:
        """True while encoder and decoder have the one bias each of the source, so that its class can hold them."""
        return self.shared_heads > 0 and self.is_uniform and self.layers[0]["heads"] == self.shared_heads

    @property
    def shared_tensors(self) -> dict[str, str]:
        """Maps names of parameters to the one of their encoder or decoder that files hold for all."""
        bias, lists = self.family.shared_bias, self.layer_lists if self.shares_bias else []
        return {f"{self.prefix(i)}{bias}": f"{self.prefix(x[0])}{bias}" for x in lists for i in x[1:]}


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)
