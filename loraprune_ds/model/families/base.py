"""The questions that each family of models answers: the tensors of its layers, and where it differs from a LLaMA.

`layer` marks tensors: which have LoRA, and along which axis they consist of groups. A mark applies if the layer has the
tensor. Shapes come from transformers' modules on the meta device (read_shape.py). Norms and other vectors of constant
size need no mark. Two checks follow at reading: the spans of a tensor add up to its axis, and no matrix is unmarked.

`c` is always transformers' object of config.json, or of one layer in it. After a cut it still has the counts of the
source. Read only widths and ratios from it there.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from loraprune_ds.files import JsonObject
from loraprune_ds.model.groups import (
    QUERY_HEADS,
    Attribute,
    Kind,
    LayerCounts,
    LayerSpec,
    TensorSpec,
)

PRUNED = "pruned_"  # prefix of the `model_type` of an export whose layers have different widths
Marks = Iterable[TensorSpec | Attribute]
SmallModel = tuple[list[int], JsonObject]  # layers of a model, and changed fields of config.json


class Mixture(NamedTuple):
    """Describes a mixture of experts, apart from the number of experts in each layer."""

    expert_size: int  # channels of one
    experts_per_token: int
    least_experts: int  # the router needs this number


class Attention(NamedTuple):
    """Describes the costs of a layer's attention, or of a delta net or Mamba-2 in its place."""

    queries: int  # query heads
    cached: int  # elements that a token adds to the KV cache
    state: int = 0  # elements of a state that does not grow


class Prefixes(NamedTuple):
    """Holds the prefixes of names in weight files. The defaults are for text classes."""

    decoder: str = "model."
    head: str = "lm_head."

    def name_on_disk(self, name: str) -> str:
        """Returns the name in weight files for a tensor's name in the text class."""
        return _with_prefix(name, Prefixes(), self)

    def name_in_class(self, name: str) -> str:
        """Undoes `name_on_disk`."""
        return _with_prefix(name, self, Prefixes())


def _with_prefix(name: str, old: Prefixes, new: Prefixes) -> str:
    for old_prefix, new_prefix in zip(old, new, strict=True):
        if name.startswith(old_prefix):
            return new_prefix + name.removeprefix(old_prefix)
    return name


class LayerList(NamedTuple):
    """Names the layers of an encoder or decoder: their path, and the field of config.json that counts them."""

    path: str = "model.layers"
    count: str = "num_hidden_layers"


@dataclass(frozen=True)
class Family:
    """Describes a family of decoder-only models with key-value heads. Subclasses override the differences."""

    softcap: str | None = None  # config field with the cap c of c · tanh(logits / c)
    logit_scale: str | None = None  # config field with the factor on the logits
    logit_divisor: str | None = None  # config field with a divisor of the logits
    eager_only: str | None = None  # the feature of its attention that sdpa lacks
    packs: bool = True  # its class keeps packed samples apart by their positions
    # The model predicts badly without BOS, also in the middle of a text.
    windows_begin_with_bos: bool = False
    fixed: tuple[Kind, ...] = ()  # kinds that lose no groups
    equal_layers: bool = False  # no modelling file can hold layers that differ
    # Norms span all heads. A cut then differs slightly from a mask, because the mean square has fewer elements.
    wide_norms: bool = False
    # vLLM's `model_impl`. "auto" prefers vLLM's own class
    vllm: Literal["auto", "transformers"] = "auto"

    layer_lists: ClassVar[tuple[LayerList, ...]] = (LayerList(),)  # an encoder's comes first
    prefixes: ClassVar[Prefixes] = Prefixes()
    # fields of config.json that get another value in memory
    in_memory: ClassVar[Mapping[str, Any]] = {}
    # the field of a pruned export with the sizes of each layer
    per_layer: ClassVar[str] = "per_layer_config"
    layer_letters: ClassVar[tuple[str, ...]] = ()  # fields with a text of one letter per layer
    # In a stock class a layer has as many groups of the first kind as of the second.
    as_many: ClassVar[Mapping[Kind, Kind]] = {}
    keeps_layers: ClassVar[str | None] = None  # why no layer may be dropped
    # a tensor that files hold once for all layers of an encoder or decoder
    shared_bias: ClassVar[str | None] = None
    has_experts: ClassVar[bool] = False
    # Sizes that config.json must have, because the class would otherwise take its defaults.
    required: ClassVar[tuple[str, ...]] = (
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "intermediate_size",
    )

    @property
    def has_encoder(self) -> bool:
        """True if an encoder before the decoder reads the source."""
        return len(self.layer_lists) > 1

    def layer(self, c: Any, i: int) -> Marks:
        """Marks the tensors of layer `i` in the order of the forward, and the counts that the forward reads."""
        raise NotImplementedError

    def lm_class(self) -> Any:
        """Returns the class with a head if AutoModelForCausalLM lacks it. Exports then need the tower."""
        return None

    def head_dim(self, c: Any) -> int:
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        heads = layer.key_value_heads
        queries = _query_heads(c, layer.counts, heads)
        return Attention(queries, 2 * heads * self.head_dim(c))

    def mixture(self, c: Any) -> Mixture | None:
        """Describes the experts, if a layer has any."""
        return None

    def times(self, c: Any, i: int, kind: Kind) -> int:
        """Returns the factor from the count in config.json to the number of groups in layer `i`."""
        return 1

    def around(self, c: Any, i: int) -> SmallModel:
        """Returns the layers of the smallest model that contains layer `i`, and its changed fields of config.json."""
        return [i], {}

    def explicit(self, config: JsonObject) -> JsonObject:
        """Names sizes in config.json that the class computes from other fields."""
        return config

    def changed_in_memory(self, c: Any) -> JsonObject:
        """Returns the fields of config.json that `in_memory` changes, except the class, with their source values."""
        fields = {name: getattr(c, name) for name in self.in_memory if name != "model_type"}
        return {name: value for name, value in fields.items() if value != self.in_memory[name]}

    # The config.json of an export

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        """Returns the fields of config.json for a layer with these counts, 0 for kinds that it lacks."""
        heads = counts.get("heads", 0)
        return {
            "num_attention_heads": _query_heads(c, counts, heads),
            "num_key_value_heads": heads,
            "intermediate_size": counts.get("channels", 0),
        }

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> JsonObject:
        """Returns the fields of config.json that hold for all layers."""
        return {"hidden_size": c.hidden_size, "head_dim": self.head_dim(c)}

    def dense_layers(self, layers: Sequence[LayerCounts]) -> JsonObject:
        """Returns the fields that say which layers have no experts."""
        return {}

    def counted(self, c: Any, layers: Sequence[LayerSpec]) -> list[LayerCounts]:
        """Returns the groups of each layer, as config.json counts them, and its key-value heads."""
        counted: list[LayerCounts] = []
        for i, layer in enumerate(layers):
            counts = {kind: n // self.times(c, i, kind) for kind, n in layer.counts.items()}
            if layer.key_value_heads:
                counts["heads"] = layer.key_value_heads
            counted.append(LayerCounts(counts))
        return counted

    def is_uniform(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        """True if all layers with groups of a kind have the same number. A stock class can then hold them."""
        counts = defaultdict[Kind, set[int]](set)
        for layer in self.counted(c, layers):
            for kind, count in layer.items():
                counts[self.as_many.get(kind, kind)].add(count)
        return all(len(distinct) == 1 for distinct in counts.values())

    def export_types(
        self, model_type: str, source: JsonObject, c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """Returns the model types that an export may have, the best first. The last needs a modelling file.

        Args:
            model_type: of the source, without PRUNED.
            source: config.json of the source.
        """
        return [model_type, PRUNED + model_type]

    def shares_bias(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        """True while all layers of an encoder, and all of a decoder, can share one bias as in the source's class."""
        return False


def _query_heads(c: Any, counts: LayerCounts, heads: int) -> int:
    """Returns the query heads of a layer with this number of key-value heads."""
    return counts.get(QUERY_HEADS) or heads * (c.num_attention_heads // c.num_key_value_heads)
