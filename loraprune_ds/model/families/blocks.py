"""Marks that many families share: attention, MLPs, experts and routers."""

from typing import Any

from loraprune_ds.model.families.base import Attribute, Marks
from loraprune_ds.model.groups import QUERY_HEADS, Span, StackSpec, TensorSpec

QUERY_HEADS_LEAVE = "query_heads_leave"  # a field of `c` that read_shape.py adds, and no file has
MLP = ("gate_proj", "up_proj", "down_proj")
# the names of the two stacks of experts (`StackSpec.names`)
OnDisk = tuple[tuple[str, ...], tuple[str, ...]]


def rows(linear: str, *spans: Span) -> TensorSpec:
    """Marks a linear with LoRA that loses outputs. Its bias loses the same elements."""
    return TensorSpec(f"{linear}.weight", spans, lora=True)


def columns(linear: str, span: Span) -> TensorSpec:
    """Marks a linear with LoRA that loses inputs. Its bias stays."""
    return TensorSpec(f"{linear}.weight", (span,), axis=1, lora=True)


def whole(module: str, *linears: str) -> list[TensorSpec]:
    """Marks linears with LoRA that no cut makes smaller."""
    return [TensorSpec(f"{module}.{linear}.weight", lora=True) for linear in linears]


def head_spans(c: Any) -> tuple[Span, tuple[Span, ...]]:
    """Returns the span of queries, and that of keys or values, which have none if they stay."""
    heads, width = (
        c.num_key_value_heads,
        getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    )
    if getattr(c, QUERY_HEADS_LEAVE, False):
        return Span(QUERY_HEADS, c.num_attention_heads, width, ranges=heads), ()
    return Span("heads", heads, c.num_attention_heads // heads * width), (
        Span("heads", heads, width),
    )


def attention(
    c: Any,
    path: str = "self_attn",
    *,
    gated: bool = False,
    sinks: bool = False,
    wide_norms: bool = False,
) -> Marks:
    """Marks attention. If gated, the query of each head comes with the gate of its output."""
    queries, keys = head_spans(c)
    yield rows(f"{path}.q_proj", queries._replace(width=(1 + gated) * queries.width))
    yield from (rows(f"{path}.{x}_proj", *keys) for x in "kv")
    yield from (columns(f"{path}.{x}", queries) for x in ("o_proj", "out_proj"))
    if sinks:
        yield per_query(f"{path}.sinks", c)
    if wide_norms:
        yield from (
            TensorSpec(f"{path}.{x}_norm.weight", spans)
            for x, spans in (("q", (queries,)), ("k", keys))
        )
    if not keys:
        yield Attribute(path, "num_key_value_groups", queries._replace(width=1), queries.ranges)


def per_query(name: str, c: Any, on_disk: str | None = None) -> TensorSpec:
    """Marks a tensor with a row for each query head."""
    queries, _ = head_spans(c)
    return TensorSpec(
        name, (queries._replace(width=c.num_attention_heads // queries.groups),), on_disk=on_disk
    )


def mlp(channels: int, path: str = "mlp") -> list[TensorSpec | Attribute]:
    """Marks an MLP under the names of all families. Gate and `up` may be one linear, or there is no gate."""
    span = Span("channels", channels)
    return [
        *(rows(f"{path}.{x}", span) for x in ("gate_proj", "up_proj", "c_fc", "w1", "w3")),
        rows(f"{path}.gate_up_proj", span, span),
        *(columns(f"{path}.{x}", span) for x in ("down_proj", "c_proj", "w2")),
        Attribute(path, "intermediate_size", span),
    ]


def each_expert(mlp: str = "mlp", names: tuple[str, str, str] = MLP) -> OnDisk:
    """Returns the names on disk where each expert has separate linears."""
    gate, up, down = (f"{mlp}.experts.{{}}.{name}.weight" for name in names)
    return (gate, up), (down,)


def stacks(
    path: str,
    span: Span,
    hidden: int,
    names: OnDisk,
    *,
    transposed: bool = False,
    gated: bool = True,
) -> list[TensorSpec]:
    """Marks the two stacks of experts. `span` counts the experts, and its width is the channels of one."""
    wide, deep = span._replace(width=(1 + gated) * span.width), span._replace(width=hidden)
    up, down = (deep, span) if transposed else (wide, deep)
    stacks = StackSpec(names[0], False, transposed), StackSpec(names[1], True, transposed)
    return [
        TensorSpec(
            f"{path}.{'gate_up' if gated else 'up'}.weight", (up,), lora=True, stack=stacks[0]
        ),
        TensorSpec(f"{path}.down.weight", (down,), lora=True, stack=stacks[1]),
    ]


def per_expert(
    name: str, span: Span, on_disk: str | None = None, *, keep_fp32: bool = False
) -> TensorSpec:
    """Marks a router, or another tensor with a row for each expert."""
    return TensorSpec(name, (span._replace(width=1),), on_disk=on_disk, keep_fp32=keep_fp32)
