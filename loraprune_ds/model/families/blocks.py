"""Marks that many families share: attention, MLPs, experts and routers."""

from typing import Any

from loraprune_ds.model.families.base import Attribute, Marks
from loraprune_ds.model.groups import QUERY_HEADS, Run, StackSpec, TensorSpec

QUERY_HEADS_LEAVE = "query_heads_leave"  # a field of `c` that read_shape.py adds, and no file has
MLP = ("gate_proj", "up_proj", "down_proj")
# the names of the two stacks of experts (`StackSpec.names`)
OnDisk = tuple[tuple[str, ...], tuple[str, ...]]


def rows(linear: str, *runs: Run) -> TensorSpec:
    """Marks a linear with LoRA that loses outputs. Its bias loses the same elements."""
    return TensorSpec(f"{linear}.weight", runs, lora=True)


def columns(linear: str, run: Run) -> TensorSpec:
    """Marks a linear with LoRA that loses inputs. Its bias stays."""
    return TensorSpec(f"{linear}.weight", (run,), axis=1, lora=True)


def whole(module: str, *linears: str) -> list[TensorSpec]:
    """Marks linears with LoRA that no cut makes smaller."""
    return [TensorSpec(f"{module}.{linear}.weight", lora=True) for linear in linears]


def head_runs(c: Any) -> tuple[Run, tuple[Run, ...]]:
    """Returns the run of queries, and that of keys or values, which have none if they stay."""
    heads, width = (
        c.num_key_value_heads,
        getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    )
    if getattr(c, QUERY_HEADS_LEAVE, False):
        return Run(QUERY_HEADS, c.num_attention_heads, width, ranges=heads), ()
    return Run("heads", heads, c.num_attention_heads // heads * width), (
        Run("heads", heads, width),
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
    queries, keys = head_runs(c)
    yield rows(f"{path}.q_proj", queries._replace(width=(1 + gated) * queries.width))
    yield from (rows(f"{path}.{x}_proj", *keys) for x in "kv")
    yield from (columns(f"{path}.{x}", queries) for x in ("o_proj", "out_proj"))
    if sinks:
        yield per_query(f"{path}.sinks", c)
    if wide_norms:
        yield from (
            TensorSpec(f"{path}.{x}_norm.weight", runs)
            for x, runs in (("q", (queries,)), ("k", keys))
        )
    if not keys:
        yield Attribute(path, "num_key_value_groups", queries._replace(width=1), queries.ranges)


def per_query(name: str, c: Any, on_disk: str | None = None) -> TensorSpec:
    """Marks a tensor with a row for each query head."""
    queries, _ = head_runs(c)
    return TensorSpec(
        name, (queries._replace(width=c.num_attention_heads // queries.groups),), on_disk=on_disk
    )


def mlp(channels: int, path: str = "mlp") -> list[TensorSpec | Attribute]:
    """Marks an MLP under the names of all families. Gate and `up` may be one linear, or there is no gate."""
    run = Run("channels", channels)
    return [
        *(rows(f"{path}.{x}", run) for x in ("gate_proj", "up_proj", "c_fc", "w1", "w3")),
        rows(f"{path}.gate_up_proj", run, run),
        *(columns(f"{path}.{x}", run) for x in ("down_proj", "c_proj", "w2")),
        Attribute(path, "intermediate_size", run),
    ]


def each_expert(mlp: str = "mlp", names: tuple[str, str, str] = MLP) -> OnDisk:
    """Returns the names on disk where each expert has separate linears."""
    gate, up, down = (f"{mlp}.experts.{{}}.{name}.weight" for name in names)
    return (gate, up), (down,)


def stacks(
    path: str, run: Run, hidden: int, names: OnDisk, *, transposed: bool = False, gated: bool = True
) -> list[TensorSpec]:
    """Marks the two stacks of experts. `run` counts the experts, and its width is the channels of one."""
    wide, deep = run._replace(width=(1 + gated) * run.width), run._replace(width=hidden)
    up, down = (deep, run) if transposed else (wide, deep)
    stacks = StackSpec(names[0], False, transposed), StackSpec(names[1], True, transposed)
    return [
        TensorSpec(
            f"{path}.{'gate_up' if gated else 'up'}.weight", (up,), lora=True, stack=stacks[0]
        ),
        TensorSpec(f"{path}.down.weight", (down,), lora=True, stack=stacks[1]),
    ]


def per_expert(
    name: str, run: Run, on_disk: str | None = None, *, keep_fp32: bool = False
) -> TensorSpec:
    """Marks a router, or another tensor with a row for each expert."""
    return TensorSpec(name, (run._replace(width=1),), on_disk=on_disk, keep_fp32=keep_fp32)
