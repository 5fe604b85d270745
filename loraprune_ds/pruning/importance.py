"""The scores of groups: each rank's part, the sum over the ranks, and the moving average over the steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.config_types import Criterion, Normalization
from loraprune_ds.errors import RunError
from loraprune_ds.model.groups import Kind, LayerKeep, TensorSpec
from loraprune_ds.model.shape import LayerLinear, LinearId, ModelShape
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, MaskGradients, score_shard
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.prunable_model import PrunableModel


@dataclass(frozen=True)
class GroupSums:
    """The scores of each span of the linears, summed over the ranks. They stay on the device."""

    shape: ModelShape
    linears: Sequence[LayerLinear]
    of_spans: Sequence[Tensor]  # float64 of each span of these linears, as in LayerScores
    step: int

    def by_layer(self, normalization: Normalization) -> list[LayerScores]:
        """Adds the scores of a layer's spans to the scores of its groups.

        `l2` first divides the scores of each span by their norm, as LoRAPrune's released code does (arXiv 2305.18403).
        A fused linear then counts like separate linears. `step` divides all scores by their sum, so steps with large
        gradients weigh the same in the moving average. `none` adds the scores unchanged.
        """
        new_zeros = self.of_spans[0].new_zeros
        layers = [
            {kind: new_zeros(count) for kind, count in counts.items()}
            for counts in self.shape.counts
        ]
        of_spans = zip(self._places(), self._normalized(normalization), strict=True)
        for (layer, _, kind), scores in of_spans:
            if scores.ndim == 1:
                scores = layers[layer][kind] + scores
            layers[layer][kind] = scores  # second moments belong to one span
        return list(map(LayerScores, layers))

    def check(self) -> None:
        """Waits for the device, and raises RunError with layer, linear and step if a score is not finite."""
        if torch.isfinite(self._sum()):
            return
        for (layer, linear, _), scores in zip(self._places(), self.of_spans, strict=True):
            if not torch.isfinite(scores).all():
                raise RunError(
                    f"step {self.step}: the score of layer {layer} {linear} is not "
                    "finite; lower train.learning_rate, or look at the data of this step"
                )

    def _normalized(self, normalization: Normalization) -> list[Tensor]:
        if normalization == "none":
            return list(self.of_spans)
        if normalization == "l2":
            divisors = [cast(Any, scores).norm() for scores in self.of_spans]
        else:
            divisors = [self._sum()] * len(self.of_spans)
        pairs = zip(self.of_spans, divisors, strict=True)
        return [scores / divisor.where(divisor > 0, 1.0) for scores, divisor in pairs]

    def _sum(self) -> Tensor:
        return torch.cat([scores.flatten() for scores in self.of_spans]).sum()

    def _places(self) -> Iterator[tuple[int, str, Kind]]:
        """Yields the layer, the linear and the kind of each span."""
        for layer, linear in self.linears:
            for span in linear.spans:
                yield layer, linear.linear, span.kind


def score_groups(
    model: PrunableModel,
    criterion: Criterion,
    step: int,
    mask_gradients: MaskGradients | None = None,
) -> GroupSums:
    """Scores all groups, with one all-reduce of O(groups), and of query heads with q for each key-value head O(q²).

    The `mask_gradients` of `fisher` has this rank's sums over tokens. Other criteria sum over this rank's shards of W.
    """
    if mask_gradients is not None:
        return add_over_ranks(model, mask_gradients.linears, mask_gradients.sums(), step)
    score_element = ELEMENT_CRITERIA[criterion]
    partial: list[Tensor] = []
    for layer, factors in enumerate(model.lora_factors()):
        for linear in model.shape.layers[layer].linears:
            if not linear.spans:
                continue
            shard = model.owned_weight(LinearId(layer, linear.linear))
            sums = score_shard(shard, factors[linear.linear], score_element, linear.axis)
            partial += sums_of_spans(linear, sums)
    return add_over_ranks(model, model.shape.linears(), partial, step)


def sums_of_spans(linear: TensorSpec, values: Tensor) -> list[Tensor]:
    """Adds up values (rows,) or (columns,) of a linear: (groups,) of each span."""
    parts = torch.split(values, [span.size for span in linear.spans])
    return [
        part.view(-1, span.width).sum(1) for span, part in zip(linear.spans, parts, strict=True)
    ]


def add_over_ranks(
    model: PrunableModel, linears: Sequence[LayerLinear], partial: list[Tensor], step: int
) -> GroupSums:
    """Sums the ranks' scores of all spans."""
    totals = model.comm.all_reduce(torch.cat([scores.flatten() for scores in partial]))
    of_spans = torch.split(totals, [scores.numel() for scores in partial])
    of_spans = [total.view_as(scores) for total, scores in zip(of_spans, partial, strict=True)]
    return GroupSums(model.shape, linears, of_spans, step)


class MovingAverage:
    """Keeps S ← λ·S + (1 − λ)·S_now over the steps that score, from zero, on the device of S_now."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.scores: list[LayerScores] | None = None
        self.updates_since_cut = 0

    def update(self, now: list[LayerScores]) -> None:
        """Adds the scores of one more step."""
        before = self.scores or [layer.map(torch.zeros_like) for layer in now]
        self.scores = [self._mix(*layers) for layers in zip(before, now, strict=True)]
        self.updates_since_cut += 1

    def _mix(self, before: LayerScores, now: LayerScores) -> LayerScores:
        mixed: dict[Kind, Tensor] = {}
        for kind, scores in now.items():
            average = before[kind].to(scores.device)  # restored scores are on the host
            mixed[kind] = self.decay * average + (1 - self.decay) * scores
        return LayerScores(mixed)

    def on_host(self) -> list[LayerScores] | None:
        """Returns the scores in host memory. None if nothing was scored yet."""
        if self.scores is None:
            return None
        return [layer.map(Tensor.cpu) for layer in self.scores]

    def cut(self, keep: list[LayerKeep]) -> None:
        """Keeps the scores of the groups that a cut leaves."""
        assert self.scores is not None
        self.scores = [scores.select(k) for scores, k in zip(self.scores, keep, strict=True)]
        self.updates_since_cut = 0
