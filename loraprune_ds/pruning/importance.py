"""The scores of groups: each rank's part, the sum over the ranks, and the moving average over the steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loraprune_ds.config_types import Criterion, Normalization
from loraprune_ds.errors import RunError
from loraprune_ds.model.groups import Kind, LayerKeep, Span
from loraprune_ds.model.shape import LayerLinear, LinearId, ModelShape
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, MaskGradients, score_shard
from loraprune_ds.pruning.layer_scores import LayerScores, flatten, views
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.device import foreach, to_device


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
        rounds: list[dict[tuple[int, Kind], Tensor]] = [{}]  # the first spans of a layer, and so on
        of_spans = zip(self._places(), self._normalized(normalization), strict=True)
        for (layer, _, kind), scores in of_spans:
            number = sum((layer, kind) in spans for spans in rounds)
            if number == len(rounds):
                rounds.append({})
            rounds[number][layer, kind] = scores
        totals, *others = rounds
        for spans in others:
            sums = foreach._foreach_add([totals[key] for key in spans], list(spans.values()))
            totals |= zip(spans, sums, strict=True)
        nothing = self._flat[:0]  # of a kind that the layer lacks
        return [
            LayerScores((kind, totals.get((layer, kind), nothing)) for kind in counts)
            for layer, counts in enumerate(self.shape.counts)
        ]

    @cached_property
    def total(self) -> Tensor:
        """The sum of all scores."""
        return self._flat.sum()

    def check(self) -> None:
        """Waits for the device, and raises RunError with layer, linear and step if a score is not finite."""
        if torch.isfinite(self.total):
            return
        spans = zip(self._places(), self.of_spans, strict=True)
        layer, linear, _ = next(place for place, x in spans if not torch.isfinite(x).all())
        raise RunError(
            f"step {self.step}: the score of layer {layer} {linear} is not "
            "finite; lower train.learning_rate, or look at the data of this step"
        )

    @cached_property
    def _flat(self) -> Tensor:
        return torch.cat([scores.flatten() for scores in self.of_spans])

    def _normalized(self, normalization: Normalization) -> Sequence[Tensor]:
        if normalization == "none":
            return self.of_spans
        sizes = [scores.numel() for scores in self.of_spans]
        divisor = self.total
        if normalization == "l2":
            norms = torch.stack(foreach._foreach_norm(self.of_spans))
            counts = to_device(torch.tensor(sizes), norms.device)
            divisor = norms.repeat_interleave(counts, output_size=len(self._flat))
        parts = torch.split(self._flat / (divisor + (divisor == 0)), sizes)
        return [part.view(x.shape) for part, x in zip(parts, self.of_spans, strict=True)]

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
    linears = [(i, linear) for i, linear in model.shape.linears() if linear.spans]
    spans = [span for _, linear in linears for span in linear.spans]
    sizes = [span.size for span in spans]
    rows = torch.zeros(sum(sizes), dtype=torch.float64, device=model.device)
    parts = iter(torch.split(rows, [linear.shape[linear.axis] for _, linear in linears]))
    for layer, factors in enumerate(model.lora_factors()):
        for linear in model.shape.layers[layer].linears:
            if linear.spans:
                shard = model.owned_weight(LinearId(layer, linear.linear))
                score_shard(next(parts), shard, factors[linear.linear], score_element, linear.axis)
    return add_over_ranks(model, linears, sums_of_groups(spans, torch.split(rows, sizes)), step)


def sums_of_groups(spans: Sequence[Span], values: Sequence[Tensor]) -> list[Tensor]:
    """Adds up the values (rows,) or (columns,) of each span: (groups,). Spans with groups of one width share a sum."""
    of_groups = list(values)
    for width in {span.width for span in spans} - {1}:
        places = [i for i, span in enumerate(spans) if span.width == width]
        sums = torch.cat([values[i] for i in places]).view(-1, width).sum(1)
        parts = torch.split(sums, [spans[i].groups for i in places])
        for i, part in zip(places, parts, strict=True):
            of_groups[i] = part
    return of_groups


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
        mixed = flatten(now).mul_(1 - self.decay)
        if self.scores is not None:
            before = flatten(self.scores).to(mixed.device)  # restored scores are on the host
            mixed += before.mul_(self.decay)
        self.scores = views(mixed, now)
        self.updates_since_cut += 1

    def on_host(self) -> list[LayerScores] | None:
        """Returns the scores in host memory. None if nothing was scored yet."""
        if self.scores is None:
            return None
        return views(flatten(self.scores).cpu(), self.scores)

    def cut(self, keep: list[LayerKeep]) -> None:
        """Keeps the scores of the groups that a cut leaves."""
        assert self.scores is not None
        flat = flatten(self.scores)
        places = views(torch.arange(len(flat)), self.scores)
        kept = [of_layer.select(k) for of_layer, k in zip(places, keep, strict=True)]
        self.scores = views(flat[to_device(flatten(kept), flat.device)], kept)
        self.updates_since_cut = 0
