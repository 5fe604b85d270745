"""The one table that knows model families: what leaves with a group of a decoder layer, and what else is special.

A decoder layer has groups of several kinds. All of a group leaves together.
  heads     one key-value head with all the query heads that read it. Under MHA it is one head.
  channels  one MLP channel.
  experts   one expert of a mixture, whole (experts.py).

Along its axis a weight is a sequence of parts. A part has all groups of a layer, one after another. Each group is
`width` rows (or columns) wide. That covers separate weights, fused ones (q|k|v, gate|up), biases and norms. All other
names and shapes come from the model itself, built on the meta device. A size that the table does not explain is
refused.

A family that is like LLaMA is one line: add its `model_type` to LLAMA_LIKE. Another kind of groups is a row of
COUNT_FIELDS, and parts of that kind in a family.
"""

from dataclasses import dataclass, replace
from typing import Literal

from loraprune_ds.errors import UserError

Kind = str
# The field of config.json that counts the groups of a kind.
COUNT_FIELDS: dict[Kind, str] = {"heads": "num_key_value_heads", "channels": "intermediate_size"}
# Rows of one group: head_dim times the query heads of a group, head_dim, the query heads of a group, 1, hidden_size,
# the channels of an expert, or those of its gate and up projections together.
Width = Literal["queries", "head", "query_count", "one", "hidden", "expert", "gate_up"]
PRUNED = "pruned_"  # prefix of the `model_type` of an export whose layers have different widths


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
    """

    name: str
    axis: Literal[0, 1]
    parts: tuple[Part, ...]
    across: Width = "hidden"
    stored: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of its groups."""
        return self.parts[0].kind

    @property
    def is_stack(self) -> bool:
        return bool(self.stored)

    @property
    def reads_groups(self) -> bool:
        """True if its inputs belong to groups. To mask these inputs is to mask the groups."""
        return self.axis == 1 or (self.is_stack and self.expert_inputs == "expert")

    @property
    def expert_inputs(self) -> Width:
        """What one expert of a stack reads."""
        return self.parts[0].width if self.transposed else self.across


@dataclass(frozen=True)
class Companion:
    """Describes a parameter without LoRA that loses rows with the groups: a norm over all heads, or a router.

    Attributes:
        across: what lies along the second axis. None: it is a vector.
        stored: its name on disk, if it has another there.
    """

    name: str
    parts: tuple[Part, ...]
    across: Width | None = None
    stored: str | None = None


@dataclass(frozen=True)
class Runtime:
    """Names a count that a forward reads from a module of the layer, so that it must follow a cut.

    Attributes:
        module: path inside the decoder layer.
        width: what the module counts per group.
    """

    module: str
    attribute: str
    kind: Kind
    width: Width = "one"


@dataclass(frozen=True)
class Mixture:
    """Names the fields of config.json about experts.

    Attributes:
        count: how many there are.
        size: how wide one is.
        new_count: the name under which transformers 5 writes `count`. It reads both.
    """

    count: str
    size: str
    new_count: str = "num_local_experts"


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
        windows_begin_with_bos: the model predicts badly without BOS, so a window in the middle of a text has it, too.
        mixture: its MLPs are mixtures of experts.
    """

    linears: tuple[Linear, ...]
    companions: tuple[Companion, ...] = ()
    runtime: tuple[Runtime, ...] = ()
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    eager_only: str | None = None
    windows_begin_with_bos: bool = False
    mixture: Mixture | None = None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of its groups, in the order of the forward: heads first.

        The last is the finest. It makes up for what whole groups of the others cannot.
        """
        return tuple(dict.fromkeys(linear.kind for linear in self.linears))

    def count_field(self, kind: Kind) -> str:
        """Returns the field of config.json that counts the groups of a kind."""
        return self.mixture.count if self.mixture and kind == "experts" else COUNT_FIELDS[kind]


QUERIES, KEYS, CHANNELS, EXPERTS = Part("heads", "queries"), Part("heads", "head"), Part("channels"), Part("experts")


def _rows(name: str, *parts: Part) -> Linear:
    return Linear(name, 0, parts)


def _columns(name: str, *parts: Part) -> Linear:
    return Linear(name, 1, parts)


ATTENTION = (
    _rows("self_attn.q_proj", QUERIES),
    _rows("self_attn.k_proj", KEYS),
    _rows("self_attn.v_proj", KEYS),
    _columns("self_attn.o_proj", QUERIES),
)
GATED_NAMES = ("gate_proj", "up_proj", "down_proj")
GATED = (_rows("mlp.gate_proj", CHANNELS), _rows("mlp.up_proj", CHANNELS), _columns("mlp.down_proj", CHANNELS))
FUSED_GATED = (_rows("mlp.gate_up_proj", CHANNELS, CHANNELS), _columns("mlp.down_proj", CHANNELS))
# A norm over the whole projected width. Its weight is sliced, so a cut there is not quite equal to a mask: what is left
# is divided by the mean square of fewer elements.
WIDE_NORMS = (
    Companion("self_attn.q_norm.weight", (QUERIES,)),
    Companion("self_attn.k_norm.weight", (KEYS,)),
)

MLP_WIDTH = Runtime("mlp", "intermediate_size", "channels")


def _mixture(block: str, gate: str, up: str, down: str, mixture: Mixture) -> Family:
    """Describes a family whose MLPs all are mixtures of gated experts. All names are those on disk."""
    stored_gate, stored_up, stored_down = (f"{block}.experts.{{}}.{name}.weight" for name in (gate, up, down))
    router = Companion("mlp.gate.weight", (EXPERTS,), "hidden", f"{block}.gate.weight")
    stacks = (
        Linear("mlp.experts.gate_up", 0, (Part("experts", "gate_up"),), "hidden", (stored_gate, stored_up)),
        Linear("mlp.experts.down", 0, (Part("experts", "hidden"),), "expert", (stored_down,)),
    )
    return Family((*ATTENTION, *stacks), (router,), mixture=mixture)


GPT_OSS = Family(
    (
        *ATTENTION,
        Linear("mlp.experts.gate_up", 0, (Part("experts", "hidden"),), "gate_up", ("mlp.experts.gate_up_proj",), True),
        Linear("mlp.experts.down", 0, (Part("experts", "expert"),), "hidden", ("mlp.experts.down_proj",), True),
    ),
    companions=(
        Companion("self_attn.sinks", (Part("heads", "query_count"),)),
        Companion("mlp.router.weight", (EXPERTS,), "hidden"),
        Companion("mlp.router.bias", (EXPERTS,)),
        Companion("mlp.experts.gate_up_proj_bias", (EXPERTS,), "gate_up"),
        Companion("mlp.experts.down_proj_bias", (EXPERTS,), "hidden"),
    ),
    eager_only="attention sinks",
    mixture=Mixture("num_local_experts", "intermediate_size"),
)


LLAMA_LINEARS = ATTENTION + GATED
LLAMA = Family(LLAMA_LINEARS, runtime=(MLP_WIDTH,))
GEMMA = replace(LLAMA, windows_begin_with_bos=True)
UNGATED = Family((*ATTENTION, _rows("mlp.up_proj", CHANNELS), _columns("mlp.down_proj", CHANNELS)))
LLAMA_LIKE = "llama mistral ministral ministral3 qwen2 qwen3 smollm3 seed_oss olmo exaone4 ernie4_5 hunyuan_v1_dense"
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(LLAMA_LIKE.split(), LLAMA),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, softcap="final_logit_softcapping", eager_only="a cap on scores (attn_logit_softcapping)"),
    "gemma3_text": replace(GEMMA, softcap="final_logit_softcapping"),
    "granite": replace(LLAMA, logit_divisor="logits_scaling"),
    "cohere2": replace(LLAMA, logit_scale="logit_scale"),
    **dict.fromkeys(("olmo2", "olmo3"), replace(LLAMA, companions=WIDE_NORMS)),
    "phi3": Family(
        (_rows("self_attn.qkv_proj", QUERIES, KEYS, KEYS), _columns("self_attn.o_proj", QUERIES), *FUSED_GATED),
        runtime=(
            Runtime("self_attn", "num_key_value_heads", "heads"),
            Runtime("self_attn.config", "num_attention_heads", "heads", "query_count"),
        ),
    ),
    **dict.fromkeys(("glm", "glm4"), Family(ATTENTION + FUSED_GATED)),
    "starcoder2": Family((*ATTENTION, _rows("mlp.c_fc", CHANNELS), _columns("mlp.c_proj", CHANNELS))),
    **dict.fromkeys(("nemotron", "arcee"), UNGATED),
    "mixtral": _mixture("block_sparse_moe", "w1", "w3", "w2", Mixture("num_local_experts", "intermediate_size")),
    "gpt_oss": GPT_OSS,
    "qwen3_moe": _mixture("mlp", *GATED_NAMES, Mixture("num_experts", "moe_intermediate_size")),
}


def family_name(model_type: str) -> str:
    """Returns the `model_type` of the family, also of an export whose layers have different widths."""
    return model_type.removeprefix(PRUNED)


def find_family(model_type: object, where: str, others: str = "") -> Family:
    """Returns the family of a model.

    Args:
        others: what the refusal names beside the families.

    Raises:
        UserError: it is in no family of the table. The line names `where`, the folder, hub id or model.
    """
    if isinstance(model_type, str) and family_name(model_type) in FAMILIES:
        return FAMILIES[family_name(model_type)]
    supported = ", ".join(sorted(FAMILIES)) + others
    raise UserError(f"{where}: model_type {model_type!r} is not supported; supported: {supported}")
