"""Makes up for removed inputs in the linears that lose inputs (o_proj, down_proj). It cannot replace experts.

Let W' = W + s·B·A, K the kept and R the removed columns, and x the inputs of a layer. The kept columns take over
the predictable part of the removed ones: W[:, K] += ΔW, with the ridge solution
ΔW = W'[:, R] · C[R, K] · (C[K, K] + λ·mean(diag C)·I)⁻¹, where C is the mean of x xᵀ.

The solution makes no output worse on the recorded tokens, because ΔW = 0 is a candidate. Rounding to 16 bits can make
an output worse if inputs share a large common part. Such an output keeps its weights.

C is symmetric, so ranks compute and send only half of it, as tiles on and right of the diagonal.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.model.shape import LayerLinear, ModelShape
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.ranks.device import has_fast_bfloat16, to_device

# 0.01 gave 47.7/60.7/133 instead of 45.7/56.4/126 (tests/benchmarks/README.md of commit 95c06ca)
RIDGE = 0.05
TILE_ROWS = 1024  # rows of a second moment that are computed at a time


def refit(linear: CollectedLinear, moment: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns the weight (out_features, in_features) with ΔW added to the kept columns, in its dtype.

    `moment` is C or any multiple of it, `kept` is on the host, `ridge` is λ. Waits for the device once. Raises RunError
    if C is zero or holds an inf or NaN.

    Solves in fp32: float64 changes the error by less than 1e-4 of it (tests/benchmarks/README.md). With n inputs, k of
    them kept, and m outputs, its peak is the largest of these bytes: right-hand side 4k² + 4(n − k)(k + m) + 4km,
    solution 8k² + 14km, check 4k² + 12km.
    """
    with (
        torch.autocast(moment.device.type, enabled=False),
        products_of(moment.dtype, moment.device),
    ):
        return _solve(linear, moment, kept, ridge)


def _solve(linear: CollectedLinear, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    is_removed = torch.ones(len(moment), dtype=torch.bool)
    is_removed[kept] = False
    removed = to_device(is_removed.nonzero().flatten(), moment.device)
    kept = to_device(kept, moment.device)
    rows = kept[:, None]
    system = moment[rows, kept]
    system.diagonal().add_(ridge * moment.diagonal().mean())
    factor, info = cast(Any, torch.linalg).cholesky_ex(system)
    del system
    effective = linear.weight.index_select(1, removed).float()
    # W'[:, R]
    effective.addmm_(linear.lora_B, linear.lora_A.index_select(1, removed), alpha=linear.scaling)
    # In shape (k, m)
    right = moment[rows, removed] @ effective.T
    del effective
    delta = torch.cholesky_solve(right, factor).T
    failed, total = cast(Any, torch.stack([info, delta.sum()])).tolist()
    if failed or not math.isfinite(total):
        raise RunError(
            "the second moment of its inputs cannot be inverted; "
            "set prune.compensate: none, or train on more tokens a step"
        )
    del factor
    old = linear.weight.index_select(1, kept)
    new = (old.float() + delta).to(old.dtype)
    del delta
    # The change of each output's mean squared error is diag(D·C[K, K]·Dᵀ − 2·D·right), with the rounded step D.
    step = new.float() - old.float()
    change = step @ moment[rows, kept]
    is_better = (
        change.sub_(right.T, alpha=2).mul_(step).sum(1) <= 0
    )  # not if NaN, of a row past fp16
    del step, change
    return linear.weight.index_copy(1, kept, new.where(is_better[:, None], old))


def measured_linears(shape: ModelShape, layers: Iterable[int] | None = None) -> list[LayerLinear]:
    """Lists the linears that lose inputs, of some layers or all. Stacks lose experts, not inputs."""
    return [(i, linear) for i, linear in shape.linears(layers) if linear.loses_inputs]


def refitted_linears(dense: ModelShape, shape: ModelShape, layer: int) -> list[str]:
    """Lists the linears of a layer that refits have changed by now: all that have lost inputs."""
    dense_shapes = {linear.linear: linear.shape for _, linear in measured_linears(dense, [layer])}
    return [
        linear.linear
        for _, linear in measured_linears(shape, [layer])
        if linear.shape != dense_shapes[linear.linear]
    ]


@contextmanager
def products_of(dtype: torch.dtype, device: torch.device) -> Generator[None]:
    """Lets fp32 products keep only the bits that numbers of a dtype have. Sums are fp32.

    TF32 of a GPU has 11 significant bits. A CPU with bf16 products has 8, and takes 0.4 of the time.
    """
    precision = "ieee"
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        precision = "tf32"
    elif device.type == "cpu" and dtype == torch.bfloat16 and has_fast_bfloat16():
        precision = "bf16"
    read, write = _precision_switch(device)
    before = read()
    write(precision)
    try:
        yield
    finally:
        write("none")
        if read() != before:  # else it follows a switch of more than products
            write(before)


def _precision_switch(device: torch.device) -> tuple[Callable[[], str], Callable[[str], None]]:
    """Returns what reads and what sets the precision of fp32 products on a device."""
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9
        names = {"none": "highest", "ieee": "highest", "tf32": "high", "bf16": "medium"}
        read = torch.get_float32_matmul_precision
        return read, lambda name: torch.set_float32_matmul_precision(names.get(name, name))
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    return lambda: matmul.fp32_precision, partial(setattr, matmul, "fp32_precision")


def _tiles(n: int) -> Iterator[tuple[slice, slice]]:
    """Yields (rows, columns) of the tiles of an (n, n) matrix: each band of rows from its diagonal on."""
    return ((slice(i, min(i + TILE_ROWS, n)), slice(i, n)) for i in range(0, n, TILE_ROWS))


def numel_sent(n: int) -> int:
    """Counts the elements of half a second moment of n inputs: about n² / 2."""
    return sum(_sizes(n))


def _sizes(n: int) -> list[int]:
    """Lists the elements of each tile."""
    return [(rows.stop - rows.start) * (n - rows.start) for rows, _ in _tiles(n)]


def _views(half: Tensor, n: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the rows, columns and values of each tile of a flat half."""
    for (rows, columns), tile in zip(_tiles(n), torch.split(half, _sizes(n)), strict=True):
        yield rows, columns, tile.view(-1, n - rows.start)


def empty_half(n: int, device: torch.device) -> Tensor:
    """Returns half of a second moment of n inputs, flat, all zero."""
    return torch.zeros(numel_sent(n), device=device)


def add_half_of_product(half: Tensor, x: Tensor) -> None:
    """Adds half of xᵀ·x to `half`, in fp32. x is (tokens, n)."""
    rows = x.float()
    with products_of(x.dtype, x.device):
        for band, columns, tile in _views(half, x.shape[1]):
            tile.addmm_(rows[:, band].T, rows[:, columns])


def from_half(half: Tensor, n: int) -> Tensor:
    """Returns the symmetric matrix, (n, n), with this half."""
    total = half.new_empty(n, n)
    for rows, columns, tile in _views(half, n):
        total[rows, columns] = tile
        if rows.stop < n:
            total[rows.stop :, rows] = tile[:, len(tile) :].T
    return total
