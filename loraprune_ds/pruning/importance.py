"""The scores of groups: element importance summed over all that leaves with a group, and its moving average."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.config import Criterion, Normalization
from loraprune_ds.errors import RunError
from loraprune_ds.model.family_row import LinearId, Part
from loraprune_ds.model.per_kind import LayerKeep, LayerTensors
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard, split_experts
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.weight_gradients import WeightGradients


class LayerScores(LayerTensors):
    """Holds the importance of a layer's groups, float64."""


@dataclass(frozen=True)
class GroupSums:
    """Holds the scores of all parts of linears, complete sums over the ranks. They lie on the device.

    Attributes:
        shape: of the model.
        linear_ids: the linears that have scores.
        parts: (groups,) float64 of each part of these linears. They are views of one tensor.
        step: that they are of.
    """

    shape: ModelShape
    linear_ids: Sequence[LinearId]
    parts: Sequence[Tensor]
    step: int

    def by_layer(self, normalization: Normalization) -> list[LayerScores]:
        """Adds the scores of a layer's parts to those of its groups.

        Each part has a norm of its own. So a fused linear counts like the separate ones of another family.

        Args:
            normalization: `l2` divides a part's scores by their norm before. The released code of LoRAPrune (arXiv
                2305.18403) does so. `step` divides all by their sum. So a step with an unusually large gradient counts
                like any other in the moving average. `none` adds them as they are.
        """
        zeros = self.parts[0].new_zeros
        total = [{kind: zeros(count) for kind, count in layer.items()} for layer in self.shape.layers]
        for (layer, _, part), score in zip(self._places(), self._normalized(normalization), strict=True):
            total[layer][part.kind] = total[layer][part.kind] + score
        return list(map(LayerScores, total))

    def check(self) -> None:
        """Checks that all are finite. It waits for the device.

        Raises:
            RunError: a score is not finite. The message names the layer, the linear and the step.
        """
        if torch.isfinite(self._sum()):
            return
        for (layer, name, _), score in zip(self._places(), self.parts, strict=True):
            if not torch.isfinite(score).all():
                raise RunError(f"step {self.step}: the score of layer {layer} {name} is not finite")

    def _normalized(self, normalization: Normalization) -> Sequence[Tensor]:
        if normalization == "l2":
            return [_divided(score, cast(Tensor, score.norm())) for score in self.parts]
        if normalization == "step":
            of_all = self._sum()
            return [_divided(score, of_all) for score in self.parts]
        return self.parts

    def _sum(self) -> Tensor:
        return torch.cat(list(self.parts)).sum()

    def _places(self) -> list[tuple[int, str, Part]]:
        """Lists the layer, the linear's name and the part that the scores are of."""
        return [(layer, linear.name, part) for layer, linear in self.linear_ids for part in linear.parts]


def _divided(scores: Tensor, by: Tensor) -> Tensor:
    """Divides, unless all scores are zero."""
    return scores / by.where(by > 0, 1.0)


def score_groups(
    model: PrunableModel, criterion: Criterion, step: int, gradients: WeightGradients | None = None
) -> GroupSums:
    """Scores all groups from the shards the ranks own: one all-reduce of O(groups) numbers.

    Args:
        criterion: a key of `ELEMENT_CRITERIA`.
        step: for messages.
        gradients: of the weights, for the criterion `gradient`.
    """
    element_criterion, shape = ELEMENT_CRITERIA[criterion], model.shape
    partial: list[Tensor] = []
    for layer, factors in enumerate(model.lora_factors()):
        for linear in shape.linears(layer):
            shard = model.owned_weight(layer, linear)
            given = None if gradients is None else gradients.owned(layer, linear)
            sums = torch.cat(
                [
                    score_shard(owned, of_expert, element_criterion, linear.axis, of_gradient)
                    for owned, of_expert, of_gradient in split_experts(shard, factors[linear.name], given)
                ]
            )
            parts = torch.split(sums, shape.part_sizes(layer, linear.parts))
            for part, rows in zip(linear.parts, parts, strict=True):
                partial.append(rows.view(-1, shape.width(part.width)).sum(1))  # (groups,)
    return add_over_ranks(model, shape.linear_ids(), partial, step)


def add_over_ranks(model: PrunableModel, linear_ids: Sequence[LinearId], partial: list[Tensor], step: int) -> GroupSums:
    """Adds up this rank's scores of all parts and those of the others, by one all-reduce."""
    totals = model.sum_over_ranks(torch.cat(partial))
    return GroupSums(model.shape, linear_ids, torch.split(totals, [len(scores) for scores in partial]), step)


def random_scores(shape: ModelShape, seed: int) -> list[LayerScores]:
    """Draws one fixed score per group for the criterion `random`, the same on any number of ranks."""
    scores: list[LayerScores] = []
    for i, layer in enumerate(shape.layers):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        draws = {kind: torch.rand(layer[kind], generator=generator, dtype=torch.float64) for kind in shape.kinds}
        scores.append(LayerScores(draws))
    return scores


class MovingAverage:
    """Keeps S ← λ·S + (1 − λ)·S_now over the steps that score. S starts at zero and is cut with the groups.

    S lies on the device of S_now. So a step that scores waits for nothing.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.scores: list[LayerScores] | None = None
        self.updates_since_cut = 0

    def update(self, now: list[LayerScores]) -> None:
        """Adds the scores of one more step, of the same groups as before."""
        if self.scores is None:
            self.scores = [LayerScores((kind, torch.zeros_like(s)) for kind, s in layer.items()) for layer in now]
        self.scores = [
            LayerScores(
                (kind, self.decay * old[kind].to(new[kind].device) + (1 - self.decay) * new[kind]) for kind in new
            )
            for old, new in zip(self.scores, now, strict=True)
        ]
        self.updates_since_cut += 1

    def on_host(self) -> list[LayerScores] | None:
        """Returns the scores in host memory. None if nothing was scored yet."""
        if self.scores is None:
            return None
        return [LayerScores((kind, scores.cpu()) for kind, scores in layer.items()) for layer in self.scores]

    def cut(self, keep: list[LayerKeep]) -> None:
        """Keeps the scores of the groups that a cut leaves."""
        assert self.scores is not None
        self.scores = [scores.select(k) for scores, k in zip(self.scores, keep, strict=True)]
        self.updates_since_cut = 0
