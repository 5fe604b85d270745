"""The sizes of the network: what a decoder layer holds, how wide it is, and all other parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loraprune_ds.model.family import FAMILIES, Family, Kind, Linear, Part, Width, family_name
from loraprune_ds.model.per_kind import LayerKeep, LayerShape


@dataclass(frozen=True)
class ModelShape:
    """Holds all sizes that matter to pruning. Names are those of the Hugging Face config where it has them.

    Attributes:
        queries_per_group: num_attention_heads / num_key_value_heads, the same in every layer.
        biases: names of the linears that have a bias, the same in every layer.
        layer_others: names inside a decoder layer and shapes of what no cut makes smaller, such as norms.
        ends: full names and shapes of the parameters outside the layers: embedding, final norm, untied head.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_group: int
    vocab_size: int
    tie_word_embeddings: bool
    layers: tuple[LayerShape, ...]
    biases: frozenset[str] = frozenset()
    layer_others: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]], hash=False)
    ends: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]], hash=False)

    @property
    def family(self) -> Family:
        return FAMILIES[family_name(self.model_type)]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of groups, in the order of all masks, draws and files."""
        return self.family.kinds

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The LoRA-adapted linears of a decoder layer, in the order of its forward."""
        return self.family.linears

    @property
    def input_linears(self) -> tuple[Linear, ...]:
        """The linears that lose inputs in a cut, such as o_proj and down_proj."""
        return tuple(linear for linear in self.linears if linear.axis == 1)

    def width(self, width: Width) -> int:
        """Returns the rows that `width` stands for."""
        per_width: dict[Width, int] = {
            "queries": self.head_dim * self.queries_per_group,
            "head": self.head_dim,
            "query_count": self.queries_per_group,
            "one": 1,
        }
        return per_width[width]

    def group_width(self, linear: Linear) -> int:
        """Counts the rows (axis 0) or columns (axis 1) of `linear` that belong to one group."""
        return sum(self.width(part.width) for part in linear.parts)

    def part_sizes(self, layer: int, parts: tuple[Part, ...]) -> list[int]:
        """Returns the rows (or columns) of each part at this layer's current width."""
        return [self.layers[layer][part.kind] * self.width(part.width) for part in parts]

    def query_heads(self, layer: LayerShape) -> int:
        """Counts the query heads of such a layer."""
        return layer["heads"] * self.queries_per_group

    def kept_indices(self, layer: int, parts: tuple[Part, ...], keep: LayerKeep) -> Tensor:
        """Returns the rows (or columns) that stay along the axis of these parts, ascending int64."""
        offset, kept = 0, list[Tensor]()
        for part, size in zip(parts, self.part_sizes(layer, parts), strict=True):
            kept.append(offset + group_indices(keep[part.kind], self.width(part.width)))
            offset += size
        return torch.cat(kept)

    def linear_shape(self, layer: int, linear: Linear) -> tuple[int, int]:
        """Returns (out_features, in_features) of a linear at this layer's current width."""
        width = sum(self.part_sizes(layer, linear.parts))
        return (width, self.hidden_size) if linear.axis == 0 else (self.hidden_size, width)

    def has_bias(self, linear: Linear) -> bool:
        """Tells if this linear has one, in every layer."""
        return linear.name in self.biases

    def lora_sizes(self, lora_rank: int) -> list[int]:
        """Returns the elements of every LoRA factor, layer by layer."""
        return [numel for i in range(len(self.layers)) for numel in self.layer_lora_sizes(i, lora_rank)]

    def layer_lora_sizes(self, layer: int, lora_rank: int) -> list[int]:
        """Returns those of one layer. Each linear has A (r, in_features), then B (out_features, r)."""
        return [lora_rank * width for linear in self.linears for width in reversed(self.linear_shape(layer, linear))]

    def group_numel(self, kind: Kind) -> int:
        """Counts the linear parameters that leave with one group, without biases."""
        return sum(self.group_width(linear) * self.hidden_size for linear in self.linears if linear.kind == kind)

    def layer_numel(self, layer: int) -> int:
        """Counts the linear parameters of one decoder layer. `prune.ratio` is a fraction of these."""
        return sum(count * self.group_numel(kind) for kind, count in self.layers[layer].items())

    def linear_numel(self) -> int:
        """Counts the linear parameters of all decoder layers."""
        return sum(self.layer_numel(i) for i in range(len(self.layers)))

    def total_numel(self) -> int:
        """Counts all parameters, each once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Returns names and shapes of all parameters, as in the weight files. A tied head is the embedding."""
        embedding, *rest = self.ends.items()
        shapes = dict([embedding])
        for layer in range(len(self.layers)):
            shapes |= self.layer_parameters(layer)
        return shapes | dict(rest)

    def layer_parameters(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Returns those of one decoder layer."""
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {}
        for linear in self.linears:
            out_features, in_features = self.linear_shape(layer, linear)
            shapes[f"{prefix}{linear.name}.weight"] = (out_features, in_features)
            if self.has_bias(linear):
                shapes[f"{prefix}{linear.name}.bias"] = (out_features,)
        for companion in self.family.companions:
            shapes[f"{prefix}{companion.name}"] = (sum(self.part_sizes(layer, companion.parts)),)
        return shapes | {f"{prefix}{name}": size for name, size in self.layer_others.items()}

    def cut_kinds(self, layer: int, keep: LayerKeep) -> list[Kind]:
        """Returns the kinds of which the layer loses groups."""
        return [kind for kind in self.kinds if len(keep[kind]) < self.layers[layer][kind]]

    def cut_linears(self, layer: int, keep: LayerKeep) -> list[Linear]:
        """Returns the linears of a layer that get smaller."""
        kinds = self.cut_kinds(layer, keep)
        return [linear for linear in self.linears if linear.kind in kinds]

    def layer_cuts(self, layer: int, keep: LayerKeep) -> Iterator[tuple[str, int, Tensor]]:
        """Yields all parameters of a layer that get smaller, LoRA apart.

        Each comes as its name inside the layer, the axis that gets smaller, and the rows (or columns) that stay along
        it. What is cut alike, such as k_proj and v_proj, has one tensor of them. The linears that lose inputs, such as
        o_proj and down_proj, keep their whole bias.
        """
        indices: dict[tuple[Part, ...], Tensor] = {}
        for linear in self.cut_linears(layer, keep):
            if linear.parts not in indices:
                indices[linear.parts] = self.kept_indices(layer, linear.parts, keep)
            kept = indices[linear.parts]
            yield f"{linear.name}.weight", linear.axis, kept
            if linear.axis == 0 and self.has_bias(linear):
                yield f"{linear.name}.bias", 0, kept
        for companion in self.family.companions:
            if companion.parts[0].kind in self.cut_kinds(layer, keep):
                yield companion.name, 0, self.kept_indices(layer, companion.parts, keep)

    def after(self, keep: Sequence[LayerKeep]) -> "ModelShape":
        """Returns what a cut leaves of the model."""
        return self.with_layers(tuple(layer_keep.shape for layer_keep in keep))

    def with_layers(self, layers: tuple[LayerShape, ...]) -> "ModelShape":
        """Returns the same model with other widths."""
        return replace(self, layers=layers)

    @property
    def is_uniform(self) -> bool:
        """True if every layer has the same counts, so that a stock model class can hold it."""
        return len(set(self.layers)) == 1


def group_indices(groups: Tensor, width: int) -> Tensor:
    """Returns (len(groups) * width,) int64: the rows or columns of some groups, each `width` wide."""
    return (groups[:, None] * width + torch.arange(width)).reshape(-1)
