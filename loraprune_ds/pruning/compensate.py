"""Makes up for removed inputs in the linears that lose inputs (o_proj, down_proj). It cannot replace experts.

Let W' = W + s·B·A, K the kept and R the removed columns, and x the inputs of a layer. The kept columns take over
the predictable part of the removed ones: W[:, K] += ΔW, with the ridge solution
ΔW = W'[:, R] · C[R, K] · (C[K, K] + λ·mean(diag C)·I)⁻¹, where C is the mean of x xᵀ.

The solution makes no output worse on the recorded tokens, because ΔW = 0 is a candidate. Rounding to 16 bits can make
an output worse if inputs share a large common part. Such an output keeps its weights.

C is symmetric, so ranks compute and send only half of it, as tiles on and right of the diagonal.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LayerLinear, LinearId, ModelShape
from loraprune_ds.pruning.prunable_model import CollectedLinear, PrunableModel, hook_inputs

# 0.01 gave 47.7/60.7/133 instead of 45.7/56.4/126 (tests/benchmarks/README.md of commit 95c06ca)
RIDGE = 0.05
TILE_ROWS = 1024  # rows of a second moment that are computed at a time


def refit(linear: CollectedLinear, moment: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Returns the weight (out_features, in_features) with ΔW added to the kept columns, in its dtype.

    `moment` is C or any multiple of it, `ridge` is λ. Raises RunError if C is zero or holds an inf or NaN.

    Solves in float64. With n inputs, k of them kept, and m outputs, its peak is the largest of these bytes: system and
    factor 4kn + 20k², right-hand side 8k² + 4kn + 12(n − k)(k + m) + 8km, solution 8k² + 24km, check 12k² + 4kn + 16km.
    """
    is_removed = torch.ones(len(moment), dtype=torch.bool, device=kept.device)
    is_removed[kept] = False
    removed = is_removed.nonzero().flatten()
    system = moment.index_select(0, kept).index_select(1, kept).double()
    system.diagonal().add_(ridge * moment.diagonal().double().mean())
    factor, info = cast(Any, torch.linalg).cholesky_ex(system)
    del system
    effective = linear.weight.index_select(1, removed).float()
    # W'[:, R]
    effective.addmm_(linear.lora_B, linear.lora_A.index_select(1, removed), alpha=linear.scaling)
    # In shape (k, m)
    right = moment.index_select(0, kept).index_select(1, removed).double() @ effective.double().T
    del effective
    delta = torch.cholesky_solve(right, factor).T
    if info.item() != 0 or not torch.isfinite(delta).all():
        raise RunError(
            "the second moment of its inputs cannot be inverted; "
            "set prune.compensate: none, or train on more tokens a step"
        )
    del factor
    old = linear.weight.index_select(1, kept)
    new = (old.double() + delta).to(old.dtype)
    del delta
    # The change of each output's mean squared error is diag(D·C[K, K]·Dᵀ − 2·D·right), with the rounded step D.
    step = new.double() - old.double()
    change = step @ moment.index_select(0, kept).index_select(1, kept).double()
    worse = change.sub_(right.T, alpha=2).mul_(step).sum(1) > 0
    del step, change
    new[worse] = old[worse]
    weight = linear.weight.clone()
    weight[:, kept] = new
    return weight


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


class InputMoments:
    """Keeps moving sums of x xᵀ over steps, (n, n) fp32, of the `layers` that may be cut.

    `tokens` moves in the same way, so sums / tokens is the mean. The last step weighs most. Only the owner of a layer
    holds its sums. In the forward pass every rank computes its part for one linear at a time, and the owner adds it
    immediately. A rank holds at most 4·n²·(ceil(layers / world_size) + 1/2) bytes for n = intermediate_size, and the
    sums of o_proj.

    Attributes:
        detach: removes the hooks from the model.
    """

    def __init__(self, model: PrunableModel, layers: Sequence[int], decay: float) -> None:
        self.sums: dict[LinearId, Tensor] = {}  # of this rank's layers
        self.tokens = 0.0  # of all ranks
        self._model = model
        self._decay = decay
        self._weight = 0.0
        self._own_tokens = 0  # of this rank in this step
        self._masks: tuple[Tensor | None, ...] | None = None  # of the micro-batch that is recorded
        linears = measured_linears(model.shape, layers)
        self._first = next((LinearId(i, linear.linear) for i, linear in linears), None)
        self.detach = hook_inputs(model, linears, self._record)

    @contextmanager
    def record_step(self) -> Generator[None]:
        """Records the forward passes of a step inside `record_forward`. Collective at its end."""
        decay = self._decay if self.tokens else 0.0
        self._weight = 1 - decay
        self._own_tokens = 0
        for value in self.sums.values():
            value.mul_(decay)
        yield
        own = torch.tensor([self._own_tokens], dtype=torch.int64, device=self._model.device)
        self.tokens = decay * self.tokens + self._weight * int(self._model.comm.all_reduce(own))

    @contextmanager
    def record_forward(self, *masks: Tensor | None) -> Generator[None]:
        """Records one micro-batch. Close it before the backward pass, which may run the forward again.

        A mask, (batch, window), is False at padding. An encoder's is first.
        """
        self._masks = masks
        try:
            yield
        finally:
            self._masks = None

    def compensate(self, keep: list[LayerKeep], step: int) -> None:
        """Refits the weights that lose inputs in the cut to `keep`, right before it. Collective."""
        linears = measured_linears(self._model.shape)
        shrinking = {
            LinearId(i, linear.linear): linear for i, linear in linears if linear.shrinks(keep[i])
        }

        def compute(linear_id: LinearId, linear: CollectedLinear) -> Tensor:
            kept = shrinking[linear_id].kept_indices(keep[linear_id.layer])
            moment = self.sums[linear_id]
            try:
                return refit(linear, moment, kept.to(moment.device))
            except RunError as error:
                raise RunError(
                    f"step {step}: layer {linear_id.layer} {linear_id.name}: {error}"
                ) from None

        self._model.replace_weights(list(shrinking), compute)

    def cut(self, keep: list[LayerKeep]) -> None:
        """Cuts the sums along with the groups. Call it before the model is cut."""
        for linear_id, moment in self.sums.items():
            linear = self._model.shape.linear(linear_id)
            layer_keep = keep[linear_id.layer]
            if linear.shrinks(layer_keep):
                kept = linear.kept_indices(layer_keep).to(self._model.device)
                half = take_half(moment.index_select(0, kept).index_select(1, kept))
                self.sums[linear_id] = from_half(half, len(kept))

    def halves(self, layer: int) -> dict[str, Tensor]:
        """Returns half of one layer's sums by linear; empty if this rank does not own it or nothing was recorded."""
        return {
            linear_id.name: take_half(value)
            for linear_id, value in self.sums.items()
            if linear_id.layer == layer
        }

    def restore(self, read: Callable[[int], dict[str, Tensor]], tokens: float) -> None:
        """Restores a checkpoint. `read` returns the `halves` of the rank that owned the layer."""
        model = self._model
        self.tokens = tokens
        for layer in range(len(model.layers)):
            if model.owner(layer) != model.rank:
                continue
            for name, half in read(layer).items():
                linear_id = LinearId(layer, name)
                inputs = model.shape.linear(linear_id).inputs
                self.sums[linear_id] = from_half(half.to(model.device), inputs)

    def clear(self) -> None:
        self.sums.clear()
        self.tokens = 0.0

    @torch.no_grad()
    def _record(self, linear_id: LinearId, inputs: Tensor) -> None:
        if self._masks is None:
            return
        layer = linear_id.layer
        mask = self._masks[self._model.shape.layers[layer].layer_list]
        x = inputs.detach()
        # (tokens, n), without padding
        rows = (x.flatten(0, 1) if mask is None else x[mask.to(x.device)]).float()
        if linear_id == self._first:
            self._own_tokens += len(rows)
        with tf32_for_halves(x.dtype, x.device):
            part = half_of_product(rows)
        total = self._model.comm.reduce_to(self._model.owner(layer), part)
        if total is None:
            return
        if linear_id not in self.sums:
            self.sums[linear_id] = total.new_zeros(x.shape[-1], x.shape[-1])
        add_half(self.sums[linear_id], total, self._weight)


@contextmanager
def tf32_for_halves(dtype: torch.dtype, device: torch.device) -> Generator[None]:
    """Allows TF32 for fp32 products of bf16 or fp16 numbers. It keeps their 11 significant bits. Sums are fp32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def half_of_product(x: Tensor) -> Tensor:
    """Returns half of xᵀ·x, flat. x is (tokens, n)."""
    half = x.new_empty(numel_sent(x.shape[1]))
    for rows, columns, tile in _views(half, x.shape[1]):
        torch.mm(x[:, rows].T, x[:, columns], out=tile)
    return half


def take_half(total: Tensor) -> Tensor:
    """Returns the tiles of a symmetric matrix, flat, like `half_of_product`."""
    return torch.cat([total[tile].reshape(-1) for tile in _tiles(len(total))])


def from_half(half: Tensor, n: int) -> Tensor:
    """Returns the symmetric matrix, (n, n), with this half."""
    return add_half(half.new_zeros(n, n), half)


def add_half(total: Tensor, half: Tensor, weight: float = 1.0) -> Tensor:
    """Adds weight · (the symmetric matrix with this half) to `total`, (n, n), and returns it."""
    for rows, columns, tile in _views(half, len(total)):
        total[rows, columns].add_(tile, alpha=weight)
        total[rows.stop :, rows].add_(tile[:, len(tile) :].T, alpha=weight)
    return total
