"""Ranking: chooses the groups that every layer keeps, from scores and a budget. Pure and deterministic.

A budget counts linear parameters of all decoder layers of the *dense* model. Ties keep the lower index.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.model.groups import Kind, LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import Budget, Limits


def rank_uniform(
    scores: list[LayerScores], current: ModelShape, limits: Limits, counts: LayerCounts
) -> list[LayerKeep]:
    """Keeps equal `counts` in every open layer, the best groups of each by its own scores (the paper's ranking).

    `scores` and the result belong to the current groups.
    """
    return keep_best(scores, limits.with_equal(counts).counts, current)


def counts_on_the_way(limits: Limits, goal: LayerCounts, part: float) -> LayerCounts:
    """Returns the counts at a fraction `part` of the way down to the goal, which never grow with `part`."""
    _, start = limits.bounds
    counts: dict[Kind, int] = {}
    for kind, highest in start.items():
        count = highest - round(part * (highest - goal[kind]))
        counts[kind] = _nearest_multiple(count, goal[kind], highest, limits.multiples[kind])
    return LayerCounts(counts)


def uniform_goal(limits: Limits, budget: Budget) -> LayerCounts:
    """Returns the counts that every open layer keeps in the end, as near to the budget's ratio as possible.

    Channels make up for what heads cannot reach. Of all counts within half a channel step from the ratio, those
    closest to the share of the heads win.
    """
    options = [_fill_up(narrowest, limits, budget) for narrowest in limits.narrowest()]
    return min(options, key=partial(_distances, limits, budget))


def _fill_up(narrowest: LayerCounts, limits: Limits, budget: Budget) -> LayerCounts:
    """Adds channels to the narrowest counts until they are as near to the ratio as possible."""
    _, highest = limits.bounds
    *coarse, fine = limits.dense.kinds
    rest = limits.leaving(budget.ratio) - _removed(limits, narrowest, coarse)
    count = highest[fine] - rest / max(1, limits.equal_numel[fine])
    channels = _nearest_multiple(count, narrowest[fine], highest[fine], limits.multiples[fine])
    return LayerCounts({**narrowest, fine: channels})


def _distances(limits: Limits, budget: Budget, counts: LayerCounts) -> tuple[float, float]:
    """Returns the distance of counts to the ratio, in parameters, and to the shares of heads, in groups."""
    *coarse, fine = limits.dense.kinds
    dense = limits.bounds[1]
    leaving = limits.leaving(budget.ratio)
    from_ratio = abs(_removed(limits, counts, limits.dense.kinds) - leaving)
    from_shares = 0.0
    for kind in coarse:
        numel = max(1, limits.equal_numel[kind])
        share = dense[kind] - leaving * budget.shares[kind] / numel
        from_shares += abs(counts[kind] - share)
    # Half a channel step is as good as no distance.
    return max(from_ratio, limits.step_numel(fine) / 2), from_shares


def _removed(limits: Limits, counts: LayerCounts, kinds: Iterable[Kind]) -> int:
    """Counts the parameters of some kinds that all open layers lose if they keep these equal counts."""
    dense = limits.bounds[1]
    return sum(limits.equal_numel[kind] * (dense[kind] - counts[kind]) for kind in kinds)


def _nearest_multiple(count: float, lowest: int, highest: int, multiple: int) -> int:
    """Returns the multiple nearest to `count` between the bounds, or one of them."""
    below = math.floor(count / multiple) * multiple
    candidates = [min(max(n, lowest), highest) for n in (below, below + multiple)]
    return min(candidates, key=lambda n: abs(n - count))


def keep_best(
    scores: list[LayerScores], counts: Sequence[Mapping[Kind, int]], current: ModelShape
) -> list[LayerKeep]:
    """Keeps the given number of groups of every layer, those with the highest scores."""
    keep: list[LayerKeep] = []
    for layer, layer_counts, spec in zip(scores, counts, current.layers, strict=True):
        layer_keep: dict[Kind, Tensor] = {}
        for kind, values in layer.items():
            best = best_first(values, spec.ranges.get(kind, 1))
            layer_keep[kind] = best[: layer_counts[kind]].sort().values
        keep.append(LayerKeep(layer_keep))
    return keep


def best_first(scores: Tensor, parts: int) -> Tensor:
    """Returns the indices of all groups: first the best of each of `parts` equal ranges, then the second best, …"""
    ranges = scores.view(parts, len(scores) // parts)
    first = torch.arange(parts)[:, None] * ranges.shape[1]  # (parts, 1)
    order = ranges.argsort(descending=True, stable=True) + first
    return order.T.flatten()


def rank_global(
    scores: list[LayerScores], current: ModelShape, limits: Limits, budget: Budget
) -> list[LayerKeep]:
    """Removes the least important groups of all open layers until the budget is spent. Arguments as for `rank_uniform`.

    Heads give their share of the ratio, channels the rest. The total ends within one group (or multiple) of the ratio.
    Channels that an earlier cut removed cannot return, so the total may exceed the ratio by half a multiple.
    """
    removal = _Removal(scores, current, limits)
    numel = round(limits.leaving(budget.ratio))
    *coarse, fine = current.kinds  # from the largest groups to the smallest
    for kind in coarse:
        share = round(numel * budget.shares[kind])
        removal.take(kind, share + removal.gone_beside(kind))
    removal.take(fine, numel)
    if numel - removal.gone > limits.step_numel(fine) / 2:  # floors have stopped the finest kind
        for kind in coarse:
            removal.take(kind, numel)
    return keep_best(scores, removal.left, current)


class _Removal:
    """Takes chunks of groups one by one, least important first, within the limits. It only counts them."""

    def __init__(self, scores: list[LayerScores], current: ModelShape, limits: Limits) -> None:
        self.scores = scores
        self.current = current
        self.limits = limits
        self.left = [dict(layer) for layer in current.counts]
        self.gone = limits.dense.linear_numel() - current.linear_numel()

    def gone_beside(self, kind: Kind) -> int:
        """Counts the parameters of other kinds that have left, including earlier cuts."""
        dense = self.limits.dense
        groups = sum(counts[kind] for counts in dense.counts)
        groups -= sum(counts[kind] for counts in self.left)
        return self.gone - groups * dense.group_numel[kind]

    def take(self, kind: Kind, budget: int) -> None:
        """Removes groups of a kind while this brings the total nearer to `budget` parameters."""
        numel = self.limits.dense.group_numel[kind]
        for layer, groups in self._candidates(kind):
            if self.gone + numel / 2 > budget:
                return
            if self.gone + groups * numel / 2 <= budget:
                self.left[layer][kind] -= groups
                self.gone += groups * numel

    def _candidates(self, kind: Kind) -> list[tuple[int, int]]:
        """Lists (layer, groups) of all chunks of a kind by ascending mean score. Ties: the last layer first."""
        candidates: list[tuple[int, int]] = []
        means: list[Tensor] = []
        for layer in reversed(self.limits.open_layers):
            count = self.left[layer][kind]
            chunks = self.limits.chunks(layer, kind, count)
            candidates += [(layer, groups) for groups in chunks]
            values = self.scores[layer][kind]
            ranges = self.current.layers[layer].ranges.get(kind, 1)
            best = best_first(values, ranges)[:count]
            ascending = values[best].flip(0)
            means.append(_chunk_means(ascending, chunks))
        order = torch.cat(means).argsort(stable=True)
        return [candidates[position] for position in cast(Any, order).tolist()]


def _chunk_means(scores: Tensor, chunks: list[int]) -> Tensor:
    """Returns (chunks,): the mean of each chunk of ascending scores. All chunks but the first have one size."""
    if not chunks:
        return scores[:0]
    first = scores[: chunks[0]].mean()
    rest = scores[chunks[0] : sum(chunks)].view(-1, chunks[-1])
    means = torch.cat([first[None], rest.mean(1)])
    return means.cummax(0).values  # rounding must not let a chunk leave before the one below it
