"""Describes a row of the table of families (family.py): a layer's tensors, and what lies along their axes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = str
# A width is a number of rows: "one" is 1, "hidden" hidden_size, "buckets" the distances of a relative position bias.
# Per group of heads: head_dim · query heads; head_dim; query heads.
OfHead = Literal["queries", "head", "query_count"]
# Latent attention: the latent queries; the latent keys and values; per head: query; non-rotary key plus value; value.
OfLatent = Literal["query_rank", "key_value_rank", "query", "key_and_value", "value"]
# An expert's channels, or the channels of its gate and up projections together.
OfExpert = Literal["expert", "gate_up"]
# Per key head of a gated delta net: key; its values; number of values; query, key, values and their gates together; two
# numbers per value. Then the kernel of the convolution.
OfDelta = Literal["delta_key", "delta_values", "delta_count", "delta_all", "delta_numbers", "kernel"]
Width = Literal[OfHead, OfLatent, OfExpert, OfDelta, "buckets", "queries_and_gates", "one", "hidden"]
# Kind -> the fields of config.json that count its groups, each with the unit that it counts per group.
COUNT_FIELDS: dict[Kind, dict[str, Width]] = {
    "heads": {"num_key_value_heads": "one", "num_attention_heads": "query_count"},
    "channels": {"intermediate_size": "one"},
    "delta": {"linear_num_key_heads": "one", "linear_num_value_heads": "delta_count"},
}


@dataclass(frozen=True)
class Part:
    """Describes all groups of one kind along an axis, one after another."""

    kind: Kind
    width: Width = "one"


@dataclass(frozen=True)
class Linear:
    """Describes one LoRA-adapted linear of a decoder layer. A cut makes it smaller and its elements are scored.

    A whole one has no parts. No cut changes it, its shape comes from the model, and a layer may lack it.

    A stack holds the linears of all experts of a layer, one below the other (experts.py).
    """

    name: str  # path inside the decoder layer, as in the weight files
    axis: Literal[0, 1]  # the axis of weight (out_features, in_features) that a cut makes smaller
    parts: tuple[Part, ...] = ()  # the groups along that axis, all of one kind
    across: Width = "hidden"  # the width of the other axis
    # Only of a stack: the names on disk of one expert's tensors in order, with {} for its number. A name without {} is
    # one tensor of three dimensions, of all experts.
    on_disk: tuple[str, ...] = ()
    transposed: bool = False  # of a stack: the rows of an expert are its inputs
    optional: bool = False  # some models of the family lack it

    @property
    def kind(self) -> Kind:
        return self.parts[0].kind if self.parts else ""

    @property
    def is_stack(self) -> bool:
        return bool(self.on_disk)

    @property
    def loses_inputs(self) -> bool:
        """True if a cut takes inputs from it, like o_proj and down_proj. Never true of a stack of experts."""
        return self.axis == 1

    @property
    def reads_groups(self) -> bool:
        """True if its inputs belong to groups. To mask these inputs is to mask the groups."""
        return self.loses_inputs or (self.is_stack and self.expert_inputs == "expert")

    @property
    def rows_are_hidden(self) -> bool:
        """True if the rows of the weight, or of each expert's, lie along the hidden axis."""
        return self.axis == 1 or any(part.width == "hidden" for part in self.parts)

    @property
    def expert_inputs(self) -> Width:
        """The inputs of one expert of a stack."""
        return self.parts[0].width if self.transposed else self.across


class LinearId(NamedTuple):
    """Names one linear of one decoder layer."""

    layer: int
    linear: Linear


@dataclass(frozen=True)
class Companion:
    """Describes a parameter without LoRA that loses rows with the groups: a norm over all heads, or a router."""

    name: str
    parts: tuple[Part, ...]
    across: tuple[Width, ...] = ()  # the widths of the other axes. A vector has none
    on_disk: str | None = None  # its name on disk, if that differs
    keep_fp32: bool = False  # it is fp32 in every model
    optional: bool = False  # some models of the family lack it
    axis: Literal[0, 1] = 0  # the axis with the groups


@dataclass(frozen=True)
class Runtime:
    """Names a count that a forward reads from a module of the layer, so that it must follow a cut."""

    module: str  # path inside the decoder layer, of a module or of its config
    attribute: str
    kind: Kind
    width: Width = "one"  # the module counts these per group


@dataclass(frozen=True)
class Mixture:
    """Names the fields of config.json about experts."""

    count: str  # the number of experts
    size: str  # the width of one
    new_count: str = "num_local_experts"  # transformers 5 writes `count` under this name. It reads both
    # The layers without experts and the number of all -> the fields that say so.
    dense: Callable[[list[int], int], dict[str, Any]] = lambda dense, layers: {}
    chosen: str = "num_experts_per_tok"  # how many a token chooses
    optional: bool = False  # some models of the family have none
    best_of_group: int = 0  # if > 0 the router first chooses `topk_group` of `n_group` groups, by so many of each


class LayerList(NamedTuple):
    """Names the layers of an encoder or decoder: their path, and the field of config.json that counts them."""

    path: str = "model.layers"
    count: str = "num_hidden_layers"


@dataclass(frozen=True)
class Family:
    """Describes a family of decoder-only models, or of an encoder with its decoder."""

    linears: tuple[Linear, ...]  # with LoRA, in the order of the forward
    companions: tuple[Companion, ...] = ()  # other parameters that a cut makes smaller
    runtime: tuple[Runtime, ...] = ()  # counts that a forward reads
    softcap: str | None = None  # config field with the cap c of c · tanh(logits / c)
    logit_scale: str | None = None  # config field with the factor on the logits
    logit_divisor: str | None = None  # config field with a divisor of the logits
    eager_only: str | None = None  # the feature of its attention that sdpa lacks
    packs: bool = True  # its class keeps packed samples apart by their positions
    windows_begin_with_bos: bool = False  # it predicts badly without BOS, also in the middle of a text
    mixture: Mixture | None = None  # its MLPs are mixtures of experts
    fixed: tuple[Kind, ...] = ()  # kinds that lose no groups
    without_lora: tuple[str, ...] = ()  # matrices that stay, and that fused kernels read past LoRA
    counts: Mapping[Kind, str] = field(default_factory=dict[Kind, str])  # count fields that are not COUNT_FIELDS
    layer_lists: tuple[LayerList, ...] = (LayerList(),)  # an encoder's comes first
    # Fields of config.json with other values in memory.
    in_memory: Mapping[str, Any] = field(default_factory=dict[str, Any])
    per_layer: str = "per_layer_config"  # the field of a pruned export with the sizes of each layer
    # A kind -> another kind with the same counts in each layer of a stock class.
    as_many: Mapping[Kind, Kind] = field(default_factory=dict[Kind, Kind])
    shared_bias: str | None = None  # a companion that files have once for all layers of an encoder or decoder
    # Sizes that follow from other fields, as functions of transformers' object.
    widths: Mapping[Width, Callable[[Any], int]] = field(default_factory=dict[Width, Any])
    # Adds sizes to config.json that the class takes from other fields.
    explicit: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    # transformers' object -> the layers with twice the channels of config.json.
    doubled: Callable[[Any], Iterable[int]] | None = None
    # (transformers' object, layer) -> layers and config overrides for the smallest model that contains the layer.
    around: Callable[[Any, int], tuple[list[int], dict[str, Any]]] = lambda config, layer: ([layer], {})
    equal_layers: bool = False  # a modelling file cannot hold layers that differ
    vllm: Literal["auto", "transformers"] = "auto"  # vLLM's `model_impl` for it. "auto" prefers vLLM's own class

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its groups, in the order of the forward: heads first.

        The last kind is the finest. It makes up for the rounding of the others.
        """
        return tuple(dict.fromkeys(linear.kind for linear in self.linears if linear.parts))

    @property
    def has_encoder(self) -> bool:
        """True if an encoder before the decoder reads the source."""
        return len(self.layer_lists) > 1

    def changed_in_memory(self, config: Any) -> dict[str, Any]:
        """Returns the fields of transformers' object that a run changes, without the class, and their values there."""
        fields = {name: getattr(config, name) for name in self.in_memory if name != "model_type"}
        return {name: value for name, value in fields.items() if value != self.in_memory[name]}

    def count_fields(self, kind: Kind) -> Mapping[str, Width]:
        """Returns the fields of config.json that count the groups of a kind, and what each counts of a group."""
        if kind in self.counts:
            return {self.counts[kind]: "one"}
        return {self.mixture.count: "one"} if self.mixture and kind == "experts" else COUNT_FIELDS[kind]
