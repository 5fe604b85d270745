"""Makes up for the inputs that a cut removes, in the linears that lose inputs, such as o_proj and down_proj.

Nothing makes up for experts that leave (model/experts.md). In a mixture it is o_proj that loses heads.

Let W' = W + s·B·A, K the kept and R the removed columns, and x the inputs of a layer. The kept columns take over what
they can predict of the removed ones: W[:, K] += ΔW. Here ΔW is the ridge solution
W'[:, R] · C[R, K] · (C[K, K] + λ·mean(diag C)·I)⁻¹, and C is the mean of x xᵀ.

ΔW = 0 is one candidate of the ridge problem. So it makes no layer's output worse on the recorded tokens.
Rounding to 16 bits could, where inputs share a large common part. An output that would get worse keeps its weights.
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

    Solves in float64. With n inputs, k of them kept, and m outputs, its peak is the largest of these, in bytes.
    4kn + 20k² for the system and its factor.
    8k² + 4kn + 12(n − k)(k + m) + 8km for the right-hand side.
    8k² + 24km for the solution.
    12k² + 4kn + 16km for the check of the rounded solution.

    Args:
        moment: C or any multiple of it, (in_features, in_features).
        kept: indices of the inputs that stay.
        ridge: λ, added to the diagonal as a fraction of its mean.

    Raises:
        RunError: C holds an inf or NaN, or is zero.
    """
    removed = removed_columns(len(moment), kept)
    system = moment.index_select(0, kept).index_select(1, kept).double()
    system.diagonal().add_(ridge * moment.diagonal().double().mean())
    factor, info = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(system))
    del system
    # C[K, R] · W'[:, R]ᵀ: (kept, out_features)
    right = moment.index_select(0, kept).index_select(1, removed).double() @ _effective(linear, removed).double().T
    delta = torch.cholesky_solve(right, factor).T
    if info.item() != 0 or not torch.isfinite(delta).all():
        raise RunError("the second moment of its inputs cannot be inverted")
    del factor
    old = linear.weight.index_select(1, kept)
    new = (old.double() + delta).to(old.dtype)
    del delta
    worse = _change_of_error(new.double() - old.double(), moment, kept, right) > 0
    new[worse] = old[worse]
    weight = linear.weight.clone()
    weight[:, kept] = new
    return weight


def _change_of_error(step: Tensor, moment: Tensor, kept: Tensor, right: Tensor) -> Tensor:
    """Returns the change of each output's mean squared error, (out_features,): diag(D·C[K, K]·Dᵀ − 2·D·right).

    D is the rounded step (out_features, kept), and right = C[K, R]·W'[:, R]ᵀ.
    """
    change = step @ moment.index_select(0, kept).index_select(1, kept).double()
    return change.sub_(right.T, alpha=2).mul_(step).sum(1)


def removed_columns(count: int, kept: Tensor) -> Tensor:
    """Returns the indices of 0 … count − 1 that are not kept, ascending, on the same device."""
    mask = torch.ones(count, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().flatten()


def _effective(linear: CollectedLinear, columns: Tensor) -> Tensor:
    """Returns columns of W + s·B·A, fp32."""
    weight = linear.weight.index_select(1, columns).float()
    return torch.addmm(weight, linear.lora_B, linear.lora_A.index_select(1, columns), alpha=linear.scaling)


class Compensator:
    """Records the inputs before each cut and makes up for those that it removes."""

    def __init__(
        self, model: PrunableModel, config: PruneConfig, schedule: Schedule, open_layers: Sequence[int]
    ) -> None:
        self._model, self._config, self._schedule = model, config, schedule
        self.moments = InputMoments(model, open_layers, config.compensate_decay)
        self._records = False

    def record_step(self, step: int) -> AbstractContextManager[None]:
        """Records the inputs of this step, if a cut follows soon enough."""
        self._records = self._schedule.precedes_cut(step, self._config.compensate_steps)
        return self.moments.record_step() if self._records else nullcontext()

    def record_forward(self, attention_mask: Tensor | None) -> AbstractContextManager[None]:
        """Records one micro-batch; `attention_mask` (batch, window) is False at padding."""
        return self.moments.record_forward(attention_mask) if self._records else nullcontext()

    def compensate(self, keep: list[LayerKeep], step: int) -> None:
        """Makes up for the cut to `keep` before it happens. Leaves layers alone that lose nothing. Collective."""
        shape = self._model.shape
        linear_ids = [
            LinearId(i, linear)
            for i in range(len(shape.layers))
            for linear in shape.cut_linears(i, keep[i])
            if linear.loses_inputs
        ]

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
