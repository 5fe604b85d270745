"""The questions that each family of models answers: the tensors of its layers, and where it differs from a LLaMA.

`layer` marks tensors: which have LoRA, and along which axis they consist of groups. It computes no shapes. Those come
from transformers' modules on the meta device (read_shape.py), so norms and other vectors that no cut makes smaller need
no mark. A mark applies if the layer has the tensor. Two checks follow at reading: the spans of a tensor add up to its
axis, and no matrix is unmarked.

`c` is always transformers' object of config.json, or of one layer of it. After a cut it still has the counts of the
source, so only widths and ratios may be read from it there.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

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


class Mixture(NamedTuple):
    """Describes a mixture of experts beside the number of them."""

    expert_size: int  # channels of one
    experts_per_token: int
    least_experts: int  # the router needs this many


class Attention(NamedTuple):
    """Describes what the attention of a layer costs, or a delta net or Mamba-2 in its place."""

    queries: int  # query heads
    # of all heads. Scores, and again sums, take this many multiply-adds for a token and one that it reads
    width: float
    cached: int  # elements that a token adds to the KV cache
    state: int = 0  # elements of a state that does not grow


class Prefixes(NamedTuple):
    """Holds the prefixes of names in weight files where a text class has the defaults."""

    decoder: str = "model."
    head: str = "lm_head."

    def name_on_disk(self, name: str) -> str:
        """Returns the name in weight files of a tensor of the class."""
        return _with_prefix(name, Prefixes(), self)

    def name_in_class(self, name: str) -> str:
        """Undoes `name_on_disk`."""
        return _with_prefix(name, self, Prefixes())


def _with_prefix(name: str, old: Prefixes, new: Prefixes) -> str:
    prefixes = zip(old, new, strict=True)
    return next(
        (to + name.removeprefix(prefix) for prefix, to in prefixes if name.startswith(prefix)), name
    )


class LayerList(NamedTuple):
    """Names the layers of an encoder or decoder: their path, and the field of config.json that counts them."""

    path: str = "model.layers"
    count: str = "num_hidden_layers"


@dataclass(frozen=True)
class Family:
    """Describes a family of decoder-only models with key-value heads. Subclasses override where theirs differ."""

    softcap: str | None = None  # config field with the cap c of c · tanh(logits / c)
    logit_scale: str | None = None  # config field with the factor on the logits
    logit_divisor: str | None = None  # config field with a divisor of the logits
    eager_only: str | None = None  # the feature of its attention that sdpa lacks
    packs: bool = True  # its class keeps packed samples apart by their positions
    # it predicts badly without BOS, also in the middle of a text
    windows_begin_with_bos: bool = False
    fixed: tuple[Kind, ...] = ()  # kinds that lose no groups
    equal_layers: bool = False  # a modelling file cannot hold layers that differ
    # Norms span over all heads. A cut there is not quite equal to a mask: the mean square is of fewer elements.
    wide_norms: bool = False
    # vLLM's `model_impl` for it. "auto" prefers vLLM's own class
    vllm: Literal["auto", "transformers"] = "auto"

    layer_lists: ClassVar[tuple[LayerList, ...]] = (LayerList(),)  # an encoder's comes first
    prefixes: ClassVar[Prefixes] = Prefixes()
    # fields of config.json that its modules have otherwise in memory
    in_memory: ClassVar[Mapping[str, Any]] = {}
    # the field of a pruned export with the sizes of each layer
    per_layer: ClassVar[str] = "per_layer_config"
    layer_letters: ClassVar[tuple[str, ...]] = ()  # fields with a text of one letter per layer
    # A kind, and another whose counts equal it in each layer of a stock class.
    as_many: ClassVar[Mapping[Kind, Kind]] = {}
    keeps_layers: ClassVar[str | None] = None  # why no layer may be dropped
    # a tensor that files have once for all layers of an encoder or decoder
    shared_bias: ClassVar[str | None] = None
    has_experts: ClassVar[bool] = False
    # The sizes that must stand in config.json, because the class would make them up.
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
        """Marks tensors of layer `i`, in the order of the forward, and counts that its forward reads."""
        raise NotImplementedError

    def lm_class(self) -> Any:
        """Returns the class with a head if AutoModelForCausalLM lacks it. Exports then need the tower."""
        return None

    def head_dim(self, c: Any) -> int:
        return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads

    def attention(self, c: Any, layer: LayerSpec) -> Attention:
        heads, width = layer.key_value_heads, self.head_dim(c)
        queries = layer.counts.get(QUERY_HEADS) or heads * (
            c.num_attention_heads // c.num_key_value_heads
        )
        return Attention(queries, queries * width, 2 * heads * width)

    def mixture(self, c: Any) -> Mixture | None:
        """Describes the experts, if a layer has any."""
        return None

    def times(self, c: Any, i: int, kind: Kind) -> int:
        """Counts the groups of a layer for each that config.json says it has."""
        return 1

    def around(self, c: Any, i: int) -> tuple[list[int], dict[str, Any]]:
        """Returns the layers, and fields of config.json, of the smallest model that contains layer `i`."""
        return [i], {}

    def explicit(self, config: dict[str, Any]) -> dict[str, Any]:
        """Names sizes in config.json that the class computes from other fields."""
        return config

    def changed_in_memory(self, c: Any) -> dict[str, Any]:
        """Returns the fields of config.json that a span changes, without the class, and their values there."""
        fields = {name: getattr(c, name) for name in self.in_memory if name != "model_type"}
        return {name: value for name, value in fields.items() if value != self.in_memory[name]}

    # The config.json of an export

    def layer_fields(self, c: Any, counts: LayerCounts) -> dict[str, int]:
        """Returns the fields of config.json for a layer with these counts. 0 where it has none."""
        heads = counts.get("heads", 0)
        queries = counts.get(QUERY_HEADS) or heads * (
            c.num_attention_heads // c.num_key_value_heads
        )
        channels = counts.get("channels", 0)
        return {
            "num_attention_heads": queries,
            "num_key_value_heads": heads,
            "intermediate_size": channels,
        }

    def model_fields(self, c: Any, layers: Sequence[LayerCounts]) -> dict[str, Any]:
        """Returns the fields of config.json for all layers together."""
        return {"hidden_size": c.hidden_size, "head_dim": self.head_dim(c)}

    def dense_layers(self, dense: list[int], layers: int) -> dict[str, Any]:
        """Returns the fields that say which of the `layers` have no experts."""
        return {}

    def counted(self, c: Any, layers: Sequence[LayerSpec]) -> list[LayerCounts]:
        """Returns the groups of each layer, as config.json counts them, and its key-value heads."""
        heads = [
            {"heads": layer.key_value_heads} if layer.key_value_heads else {} for layer in layers
        ]
        return [
            LayerCounts(
                {kind: count // self.times(c, i, kind) for kind, count in layer.counts.items()}
                | heads[i]
            )
            for i, layer in enumerate(layers)
        ]

    def is_uniform(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        """True if all layers with groups of a kind have the same number, so that a stock class can hold them."""
        counts = defaultdict[Kind, set[int]](set)
        for layer in self.counted(c, layers):
            for kind, count in layer.items():
                counts[self.as_many.get(kind, kind)].add(count)
        return all(len(found) == 1 for found in counts.values())

    def export_types(
        self, own: str, source: dict[str, Any], c: Any, layers: Sequence[LayerSpec]
    ) -> list[str]:
        """Returns the model types that an export may have, the best first. The last is that of a modelling file.

        Args:
            own: the model type of the source, without PRUNED.
            source: its config.json.
        """
        return [own, PRUNED + own]

    def shares_bias(self, c: Any, layers: Sequence[LayerSpec]) -> bool:
        """True while encoder and decoder have the one bias each of the source, so that its class can hold them."""
        return False
