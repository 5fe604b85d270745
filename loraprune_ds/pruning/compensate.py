"""Makes up for the inputs that a cut removes, in the linears that lose inputs (o_proj, down_proj), not for experts.

Let W' = W + s·B·A, K the kept and R the removed columns, and x the inputs of a layer. The kept columns take over what
they can predict of the removed ones: W[:, K] += ΔW, with the ridge solution
ΔW = W'[:, R] · C[R, K] · (C[K, K] + λ·mean(diag C)·I)⁻¹, where C is the mean of x xᵀ.

The solution makes no output worse on the recorded tokens, because ΔW = 0 is a candidate. Rounding to 16 bits could,
where inputs share a large common part, so an output that would get worse keeps its weights.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import RunError
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.pruning.input_moments import InputMoments
from loraprune_ds.pruning.prunable_model import CollectedLinear, LinearId, PrunableModel
from loraprune_ds.pruning.schedule import Schedule

RIDGE = 0.05  # measured with 0.01 too: tests/benchmarks/README.md


def refit(linear: CollectedLinear, moment: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Adds ΔW to the kept columns of the weight: (out_features, in_features), in its own dtype.

    `moment` is C or any multiple of it, `ridge` is λ. Raises RunError if C is zero or holds an inf or NaN.

    Solves in float64. With n inputs, k of them kept, and m outputs, its peak is the largest of these bytes: system and
    factor 4kn + 20k², right-hand side 8k² + 4kn + 12(n − k)(k + m) + 8km, solution 8k² + 24km, check 12k² + 4kn + 16km.
    """
    leaves = torch.ones(len(moment), dtype=torch.bool, device=kept.device).index_fill_(0, kept, False)
    removed = leaves.nonzero().flatten()
    system = moment.index_select(0, kept).index_select(1, kept).double()
    system.diagonal().add_(ridge * moment.diagonal().double().mean())
    factor, info = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(system))
    del system
    effective = linear.weight.index_select(1, removed).float()
    effective.addmm_(linear.lora_B, linear.lora_A.index_select(1, removed), alpha=linear.scaling)  # W'[:, R]
    right = moment.index_select(0, kept).index_select(1, removed).double() @ effective.double().T  # (k, m)
    del effective
    delta = torch.cholesky_solve(right, factor).T
    if info.item() != 0 or not torch.isfinite(delta).all():
        raise RunError("the second moment of its inputs cannot be inverted")
    del factor
    old = linear.weight.index_select(1, kept)
    new = (old.double() + delta).to(old.dtype)
    del delta
    # The change of each output's mean squared error: diag(D·C[K, K]·Dᵀ − 2·D·right), with the rounded step D.
    step = new.double() - old.double()
    change = step @ moment.index_select(0, kept).index_select(1, kept).double()
    worse = change.sub_(right.T, alpha=2).mul_(step).sum(1) > 0
    del step, change
    new[worse] = old[worse]
    weight = linear.weight.clone()
    weight[:, kept] = new
    return weight


class Compensator:
    """Records the inputs before each cut and makes up for the inputs that it removes."""

    def __init__(
        self, model: PrunableModel, config: PruneConfig, schedule: Schedule, open_layers: Sequence[int]
    ) -> None:
        self._model, self._config, self._schedule = model, config, schedule
        self.moments = InputMoments(model, open_layers, config.compensate_decay)
        self._records = False

    def record_step(self, step: int) -> AbstractContextManager[None]:
        """Records the inputs of this step if a cut follows within `prune.compensate_steps`."""
        self._records = self._schedule.precedes_cut(step, self._config.compensate_steps)
        return self.moments.record_step() if self._records else nullcontext()

    def record_forward(self, attention_mask: Tensor | None) -> AbstractContextManager[None]:
        """Records one micro-batch; `attention_mask` (batch, window) is False at padding."""
        return self.moments.record_forward(attention_mask) if self._records else nullcontext()

    def compensate(self, keep: list[LayerKeep], step: int) -> None:
        """Makes up for the cut to `keep` before it happens. Collective."""
        shape = self._model.shape
        cut = ((i, linear) for i, layer in enumerate(keep) for linear in shape.cut_linears(i, layer))
        linear_ids = [LinearId(i, linear) for i, linear in cut if linear.loses_inputs]

        def compute(linear_id: LinearId, linear: CollectedLinear) -> Tensor:
            moment = self.moments.sums[linear_id]
            kept = shape.kept_indices(linear_id.layer, linear_id.linear.parts, keep[linear_id.layer]).to(moment.device)
            try:
                return refit(linear, moment, kept)
            except RunError as error:
                raise RunError(f"step {step}: layer {linear_id.layer} {linear_id.linear.name}: {error}") from None

        self._model.replace_weights(linear_ids, compute)
        if step == self._schedule.last_cut:
            self.moments.clear()
        else:
            self.moments.cut(keep)
