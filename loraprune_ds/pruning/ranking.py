"""Ranking: chooses the groups that every layer keeps, from scores and a budget. Pure and deterministic.

A budget counts linear parameters of all decoder layers of the *dense* model. Ties keep the lower index.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.model.groups import Kind, LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import Bounds, Budget, Limits


def rank_uniform(
    scores: list[LayerScores], current: ModelShape, limits: Limits, counts: LayerCounts
) -> list[LayerKeep]:
    """Keeps equal `counts` in every open layer, the best groups of each by its own scores (the paper's ranking).

    `scores` and the result belong to the current groups.
    """
    return keep_best(scores, limits.with_equal(counts, current).counts, current)


def counts_on_the_way(limits: Limits, bounds: Bounds, part: float) -> LayerCounts:
    """Returns the counts at a fraction `part` of the way down the bounds, which never grow with `part`."""
    goal, start = bounds
    counts = {kind: count - round(part * (count - goal[kind])) for kind, count in start.items()}
    near = {
        kind: _nearest_multiple(n, goal[kind], start[kind], limits.multiples[kind])
        for kind, n in counts.items()
    }
    return LayerCounts(near)


def uniform_goal(limits: Limits, budget: Budget, bounds: Bounds | None = None) -> LayerCounts:
    """Returns the counts that every open layer keeps in the end, as near to the budget's ratio as possible.

    Channels make up for what heads cannot reach. Of all counts within half a channel step from the ratio, those
    closest to the share of the heads win.

    Args:
        bounds: bounds of the counts, narrower than those of `limits`.
    """
    (*coarse, fine), dense, bounds = limits.dense.kinds, limits.bounds[1], bounds or limits.bounds
    wanted = limits.leaving(budget.ratio)  # parameters that leave
    numel = {kind: max(1, part) for kind, part in limits.equal_numel.items()}
    share = {kind: dense[kind] - wanted * budget.shares[kind] / numel[kind] for kind in coarse}
    multiple = limits.multiples[fine]

    def option(narrowest: LayerCounts) -> tuple[float, float, LayerCounts]:
        """Fills the counts up with channels: (distance to the ratio, distance to the shares, counts)."""
        lost = sum(numel[kind] * (dense[kind] - narrowest[kind]) for kind in coarse)
        count = dense[fine] - (wanted - lost) / numel[fine]
        channels = _nearest_multiple(count, narrowest[fine], bounds[1][fine], multiple)
        distance = abs(lost + numel[fine] * (dense[fine] - channels) - wanted)
        shares = sum(abs(narrowest[kind] - share[kind]) for kind in coarse)
        return (
            max(distance, multiple * numel[fine] / 2),
            shares,
            LayerCounts({**narrowest, fine: channels}),
        )

    return min(map(option, limits.narrowest(bounds)), key=lambda distances: distances[:2])[-1]


def _nearest_multiple(count: float, lowest: int, highest: int, multiple: int) -> int:
    """Returns the multiple nearest to `count` between the bounds, or one of them."""
    below = math.floor(count / multiple) * multiple
    return min(
        (min(max(c, lowest), highest) for c in (below, below + multiple)),
        key=lambda c: abs(c - count),
    )


def keep_best(
    scores: list[LayerScores], counts: Sequence[Mapping[Kind, int]], current: ModelShape
) -> list[LayerKeep]:
    """Keeps the given number of groups of every layer, those with the highest scores."""
    return [
        LayerKeep(
            (kind, best_first(values, spec.ranges.get(kind, 1))[: wanted[kind]].sort().values)
            for kind, values in layer.items()
        )
        for layer, wanted, spec in zip(scores, counts, current.layers, strict=True)
    ]


def best_first(scores: Tensor, parts: int) -> Tensor:
    """Returns the indices of all groups: first the best of each of `parts` equal ranges, then the second best, …"""
    ranges = scores.view(parts, len(scores) // parts)
    order = (
        ranges.argsort(descending=True, stable=True)
        + torch.arange(parts)[:, None] * ranges.shape[1]
    )
    return order.T.flatten()


def rank_global(
    scores: list[LayerScores], current: ModelShape, limits: Limits, budget: Budget
) -> list[LayerKeep]:
    """Removes the least important groups of all open layers until the budget is spent. Arguments as for `rank_uniform`.

    Heads give their share of the ratio, channels the rest. The total ends within one group (or multiple) of the
    ratio, or half a multiple of channels beyond, because channels that replaced a head do not come back.
    """
    removal, numel = _Removal(scores, current, limits), round(limits.leaving(budget.ratio))
    *coarse, fine = current.kinds
    for kind in coarse:
        removal.take(kind, round(numel * budget.shares[kind]) + removal.gone_beside(kind))
    removal.take(fine, numel)
    if numel - removal.gone > limits.step_numel(fine) / 2:  # floors have stopped the finest kind
        for kind in coarse:
            removal.take(kind, numel)
    return keep_best(scores, removal.left, current)


class _Removal:
    """Takes chunks of groups one by one, least important first, within the limits. It only counts them."""

    def __init__(self, scores: list[LayerScores], current: ModelShape, limits: Limits) -> None:
        self.scores, self.current, self.limits = scores, current, limits
        self.left = [dict(layer) for layer in current.counts]
        self.gone = limits.dense.linear_numel() - current.linear_numel()

    def gone_beside(self, kind: Kind) -> int:
        """Counts the parameters of the other kinds that are gone so far, including earlier cuts."""
        dense = self.limits.dense
        lost = sum(
            before[kind] - left[kind] for before, left in zip(dense.counts, self.left, strict=True)
        )
        return self.gone - lost * dense.group_numel[kind]

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
        candidates, means = list[tuple[int, int]](), list[Tensor]()
        for layer in reversed(self.limits.open_layers):
            left, values = self.left[layer][kind], self.scores[layer][kind]
            chunks = self.limits.chunks(layer, kind, left)
            candidates.extend((layer, groups) for groups in chunks)
            best = best_first(values, self.current.layers[layer].ranges.get(kind, 1))[:left]
            means.append(_chunk_means(values[best].flip(0), chunks))
        order: list[int] = cast(Any, torch.cat(means).argsort(stable=True)).tolist()
        return [candidates[position] for position in order]


def _chunk_means(scores: Tensor, chunks: list[int]) -> Tensor:
    """Returns (chunks,): the mean of each chunk of ascending scores. All chunks but the first have one size."""
    if not chunks:
        return scores[:0]
    first, rest = scores[: chunks[0]], scores[chunks[0] : sum(chunks)]
    means = torch.cat([first.mean()[None], rest.view(-1, chunks[-1]).mean(1)])
    return means.cummax(0).values  # rounding must not let a chunk leave before the one below it
