"""Describes a row of the table of families (family.py): a layer's tensors, and what lies along their axes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = str
# The field of config.json that counts the groups of a kind.
COUNT_FIELDS: dict[Kind, str] = {"heads": "num_key_value_heads", "channels": "intermediate_size"}
# Rows of one group: head_dim times the query heads of a group, head_dim, the query heads of a group, 1 or hidden_size.
OfHead = Literal["queries", "head", "query_count"]
# With latent attention: the latent queries, the latent keys and values, and of a head its query, the key without rotary
# embedding and the value, the value alone.
OfLatent = Literal["query_rank", "key_value_rank", "query", "key_and_value", "value"]
# Of an expert: its channels, or those of its gate and up projections together.
OfExpert = Literal["expert", "gate_up"]
Width = Literal[OfHead, OfLatent, OfExpert, "one", "hidden"]


@dataclass(frozen=True)
class Part:
    """Describes all groups of one kind along an axis, one after another."""

    kind: Kind
    width: Width = "one"


@dataclass(frozen=True)
class Linear:
    """Describes one LoRA-adapted linear of a decoder layer. A cut makes it smaller and its elements are scored.

    Attributes:
        name: path inside the decoder layer, as in the weight files.
        axis: the axis of weight (out_features, in_features) that a cut makes smaller.
        parts: what lies along that axis. All parts of a linear are of one kind.
        across: what lies along the other axis.
        stored: of a stack, what lies on disk for one expert, one after another: names with {} for its number. A name
            without {} is one tensor of three dimensions, of all experts. A stack has the linears of all experts of a
            layer, one below the other (experts.py). Empty: it is one linear.
        transposed: of a stack, the rows of an expert are its inputs.
        optional: some models of the family lack it.
    """

    name: str
    axis: Literal[0, 1]
    parts: tuple[Part, ...]
    across: Width = "hidden"
    stored: tuple[str, ...] = ()
    transposed: bool = False
    optional: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of its groups."""
        return self.parts[0].kind

    @property
    def is_stack(self) -> bool:
        return bool(self.stored)

    @property
    def loses_inputs(self) -> bool:
        """True if a cut takes its inputs, as those of o_proj and down_proj. A stack of experts does not count."""
        return self.axis == 1

    @property
    def reads_groups(self) -> bool:
        """True if its inputs belong to groups. To mask these inputs is to mask the groups."""
        return self.loses_inputs or (self.is_stack and self.expert_inputs == "expert")

    @property
    def rows_are_hidden(self) -> bool:
        """True if the rows of the weight, or of each expert's, lie along the hidden axis."""
        return self.axis == 1 or self.parts[0].width == "hidden"

    @property
    def expert_inputs(self) -> Width:
        """Returns what one expert of a stack reads."""
        return self.parts[0].width if self.transposed else self.across


Linears = tuple[Linear, ...]


class LinearId(NamedTuple):
    """Names one linear of one decoder layer."""

    layer: int
    linear: Linear


@dataclass(frozen=True)
class Companion:
    """Describes a parameter without LoRA that loses rows with the groups: a norm over all heads, or a router.

    Attributes:
        across: what lies along the second axis. None: it is a vector.
        stored: its name on disk, if it has another there.
        exact: it is fp32 in every model.
    """

    name: str
    parts: tuple[Part, ...]
    across: Width | None = None
    stored: str | None = None
    exact: bool = False


@dataclass(frozen=True)
class Runtime:
    """Names a count that a forward reads from a module of the layer, so that it must follow a cut.

    Attributes:
        module: path inside the decoder layer, of a module or of its config.
        width: what the module counts per group.
    """

    module: str
    attribute: str
    kind: Kind
    width: Width = "one"


def no_dense(layers: list[int]) -> dict[str, Any]:
    """Describes the dense layers of a family that has none."""
    assert not layers
    return {}


@dataclass(frozen=True)
class Mixture:
    """Names the fields of config.json about experts.

    Attributes:
        count: how many there are.
        size: how wide one is.
        new_count: the name under which transformers 5 writes `count`. It reads both.
        dense: the layers without experts -> the fields that say so.
        grouped: its router first chooses `topk_group` of `n_group` groups of experts, by the best two of each.
    """

    count: str
    size: str
    new_count: str = "num_local_experts"
    dense: Callable[[list[int]], dict[str, Any]] = no_dense
    grouped: bool = False


@dataclass(frozen=True)
class Family:
    """Describes a family of decoder-only models.

    Attributes:
        linears: the LoRA-adapted linears of a decoder layer, in the order of its forward.
        companions: other parameters that a cut makes smaller.
        runtime: counts that a forward reads.
        softcap: config field with the cap c of c · tanh(logits / c), if the family has one.
        logit_scale: config field with the factor on the logits.
        logit_divisor: config field with a divisor of the logits.
        eager_only: what attention has that sdpa lacks.
        packs: its class keeps packed samples apart by their positions.
        windows_begin_with_bos: the model predicts badly without BOS, so a window in the middle of a text has it, too.
        mixture: its MLPs are mixtures of experts.
        whole: how the names of matrices begin that no cut makes smaller. They have no LoRA.
        fixed: kinds of which nothing leaves.
        widths: sizes that config.json has fields for. A width is the sum of its fields.
        vllm: vLLM's `model_impl` for it. "auto" is vLLM's own class, if there is one.
    """

    linears: tuple[Linear, ...]
    companions: tuple[Companion, ...] = ()
    runtime: tuple[Runtime, ...] = ()
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    eager_only: str | None = None
    packs: bool = True
    windows_begin_with_bos: bool = False
    mixture: Mixture | None = None
    whole: tuple[str, ...] = ()
    fixed: tuple[Kind, ...] = ()
    widths: Mapping[Width, tuple[str, ...]] = field(default_factory=dict[Width, tuple[str, ...]])
    vllm: Literal["auto", "transformers"] = "auto"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its groups, in the order of the forward: heads first.

        The last is the finest. It makes up for what whole groups of the others cannot.
        """
        return tuple(dict.fromkeys(linear.kind for linear in self.linears))

    def count_field(self, kind: Kind) -> str:
        """Returns the field of config.json that counts the groups of a kind."""
        return self.mixture.count if self.mixture and kind == "experts" else COUNT_FIELDS[kind]
