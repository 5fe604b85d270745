"""The scores of groups: element importance summed over all that leaves with a group, and its moving average."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.config import Criterion, Normalization
from loraprune_ds.errors import RunError
from loraprune_ds.model.family import Kind, Linear
from loraprune_ds.model.per_kind import LayerKeep, LayerTensors
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.weight_gradients import WeightGradients


class LayerScores(LayerTensors):
    """Holds the importance of a layer's groups, float64."""


def score_groups(
    model: PrunableModel,
    criterion: Criterion,
    normalization: Normalization,
    step: int,
    gradients: WeightGradients | None = None,
) -> list[LayerScores]:
    """Scores all groups from the shards the ranks own: one all-reduce of O(groups) numbers.

    Args:
        criterion: a key of `ELEMENT_CRITERIA`.
        normalization: `l2` divides a linear's scores by their norm before the linears of a layer are added up. The
            released code of LoRAPrune (arXiv 2305.18403) does so. `none` adds them as they are.
        step: for messages.
        gradients: of the weights, for the criterion `gradient`.

    Raises:
        RunError: a score is not finite. The message names the layer, the linear and the step.
    """
    element_criterion, shape = ELEMENT_CRITERIA[criterion], model.shape
    partial: list[Tensor] = []
    for layer in range(len(shape.layers)):
        factors = model.lora_factors(layer)
        for linear in shape.linears:
            shard = model.owned_weight(layer, linear)
            given = () if gradients is None else (gradients.owned(layer, linear),)
            sums = score_shard(shard, factors[linear.name], element_criterion, linear.axis, *given)
            parts = torch.split(sums, shape.part_sizes(layer, linear.parts))
            for part, rows in zip(linear.parts, parts, strict=True):
                partial.append(rows.view(-1, shape.width(part.width)).sum(1))  # (groups,)
    return complete_scores(model, shape.linears, partial, normalization, step)


def complete_scores(
    model: PrunableModel, linears: tuple[Linear, ...], partial: list[Tensor], normalization: Normalization, step: int
) -> list[LayerScores]:
    """Adds up the partial scores of all ranks, by one all-reduce, and then those of a group's linears.

    Args:
        linears: those of a layer that have scores.
        partial: this rank's (groups,) float64 of each part of these linears, layer by layer.
        normalization, step: as in `score_groups`.

    Raises:
        RunError: a score is not finite. The message names the layer, the linear and the step.
    """
    sizes = [len(scores) for scores in partial]
    totals: tuple[Tensor, ...] = torch.split(model.sum_over_ranks(torch.cat(partial)).cpu(), sizes)
    count = sum(len(linear.parts) for linear in linears)
    return [
        _add_parts(linears, totals[i * count : (i + 1) * count], normalization, layer=i, step=step)
        for i in range(len(model.shape.layers))
    ]


def _add_parts(
    linears: tuple[Linear, ...], scores: Sequence[Tensor], normalization: Normalization, *, layer: int, step: int
) -> LayerScores:
    """Adds the scores of all parts of a layer's linears, complete sums over the ranks, to those of its groups.

    Each part has a norm of its own. So a fused linear counts like the separate ones of another family.
    """
    total: dict[Kind, Tensor] = {}
    parts = [(linear, part) for linear in linears for part in linear.parts]
    for (linear, part), score in zip(parts, scores, strict=True):
        if not torch.isfinite(score).all():
            raise RunError(f"step {step}: the score of layer {layer} {linear.name} is not finite")
        norm = cast(Tensor, score.norm())
        if normalization == "l2" and norm > 0:
            score = score / norm
        total[part.kind] = total[part.kind] + score if part.kind in total else score
    return LayerScores(total)


def random_scores(shape: ModelShape, seed: int) -> list[LayerScores]:
    """Draws one fixed score per group for the criterion `random`, the same on any number of ranks."""
    scores: list[LayerScores] = []
    for i, layer in enumerate(shape.layers):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        draws = {kind: torch.rand(layer[kind], generator=generator, dtype=torch.float64) for kind in shape.kinds}
        scores.append(LayerScores(draws))
    return scores


class MovingAverage:
    """Keeps S ← λ·S + (1 − λ)·S_now over the steps that score. S starts at zero and is cut with the groups."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.scores: list[LayerScores] | None = None
        self.updates_since_cut = 0

    def update(self, now: list[LayerScores]) -> None:
        """Adds the scores of one more step, of the same groups as before."""
        if self.scores is None:
            self.scores = [LayerScores((kind, torch.zeros_like(s)) for kind, s in layer.items()) for layer in now]
        self.scores = [
            LayerScores((kind, self.decay * old[kind] + (1 - self.decay) * new[kind]) for kind in new)
            for old, new in zip(self.scores, now, strict=True)
        ]
        self.updates_since_cut += 1

    def cut(self, keep: list[LayerKeep]) -> None:
        """Keeps the scores of the groups that a cut leaves."""
        assert self.scores is not None
        self.scores = [scores.select(k) for scores, k in zip(self.scores, keep, strict=True)]
        self.updates_since_cut = 0
