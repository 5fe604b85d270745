"""Marks that many families share: attention, MLPs, experts and routers."""

from typing import Any

from loraprune_ds.model.families.base import Attribute, Marks
from loraprune_ds.model.groups import QUERY_HEADS, Span, StackSpec, TensorSpec

QUERY_HEADS_LEAVE = "query_heads_leave"  # a field of `c` that read_shape.py adds; no file has it
MLP = ("gate_proj", "up_proj", "down_proj")
# the names of the two stacks of experts, `gate_up` and `down` (`StackSpec.names`)
OnDisk = tuple[tuple[str, ...], tuple[str, ...]]


def rows(linear: str, *spans: Span) -> TensorSpec:
    """Marks a linear with LoRA that loses outputs. Its bias loses the same elements."""
    return TensorSpec(f"{linear}.weight", spans, lora=True)


def columns(linear: str, span: Span) -> TensorSpec:
    """Marks a linear with LoRA that loses inputs. Its bias stays."""
    return TensorSpec(f"{linear}.weight", (span,), axis=1, lora=True)


def whole(module: str, *linears: str) -> list[TensorSpec]:
    """Marks linears with LoRA that keep their size."""
    return [TensorSpec(f"{module}.{linear}.weight", lora=True) for linear in linears]


def head_spans(c: Any) -> tuple[Span, tuple[Span, ...]]:
    """Returns the span of queries, and the spans of keys or values: one, or none if key-value heads stay."""
    heads = c.num_key_value_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if getattr(c, QUERY_HEADS_LEAVE, False):
        return Span(QUERY_HEADS, c.num_attention_heads, width, ranges=heads), ()
    queries = Span("heads", heads, c.num_attention_heads // heads * width)
    return queries, (Span("heads", heads, width),)


def attention(
    c: Any,
    path: str = "self_attn",
    *,
    gated: bool = False,
    sinks: bool = False,
    wide_norms: bool = False,
) -> Marks:
    """Marks attention. If gated, each head of q_proj has the rows of a query and of its output's gate."""
    queries, keys = head_spans(c)
    width = 2 * queries.width if gated else queries.width
    yield rows(f"{path}.q_proj", queries._replace(width=width))
    yield rows(f"{path}.k_proj", *keys)
    yield rows(f"{path}.v_proj", *keys)
    yield columns(f"{path}.o_proj", queries)
    yield columns(f"{path}.out_proj", queries)
    if sinks:
        yield per_query(f"{path}.sinks", c)
    if wide_norms:
        yield TensorSpec(f"{path}.q_norm.weight", (queries,))
        yield TensorSpec(f"{path}.k_norm.weight", keys)
    if not keys:
        yield Attribute(path, "num_key_value_groups", queries._replace(width=1), queries.ranges)


def per_query(name: str, c: Any, on_disk: str | None = None) -> TensorSpec:
    """Marks a tensor with a row for each query head."""
    queries, _ = head_spans(c)
    span = queries._replace(width=c.num_attention_heads // queries.groups)
    return TensorSpec(name, (span,), on_disk=on_disk)


def mlp(channels: int, path: str = "mlp") -> Marks:
    """Marks an MLP under the names of all families. Gate and `up` may be one linear, or there is no gate."""
    span = Span("channels", channels)
    for up in ("gate_proj", "up_proj", "c_fc", "w1", "w3"):
        yield rows(f"{path}.{up}", span)
    yield rows(f"{path}.gate_up_proj", span, span)
    for down in ("down_proj", "c_proj", "w2"):
        yield columns(f"{path}.{down}", span)
    yield Attribute(path, "intermediate_size", span)


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
) -> Marks:
    """Marks the two stacks of experts. `span` counts the experts, and its width is the channels of one."""
    up_names, down_names = names
    hidden_rows = span._replace(width=hidden)
    up_rows = span._replace(width=2 * span.width) if gated else span
    down_rows = hidden_rows
    if transposed:  # the rows are inputs
        up_rows = hidden_rows
        down_rows = span
    up = f"{path}.gate_up.weight" if gated else f"{path}.up.weight"
    up_stack = StackSpec(up_names, reads_channels=False, transposed=transposed)
    down_stack = StackSpec(down_names, reads_channels=True, transposed=transposed)
    yield TensorSpec(up, (up_rows,), lora=True, stack=up_stack)
    yield TensorSpec(f"{path}.down.weight", (down_rows,), lora=True, stack=down_stack)


def per_expert(
    name: str, span: Span, on_disk: str | None = None, *, keep_fp32: bool = False
) -> TensorSpec:
    """Marks a router, or another tensor with a row for each expert."""
    return TensorSpec(name, (span._replace(width=1),), on_disk=on_disk, keep_fp32=keep_fp32)
