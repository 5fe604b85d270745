"""Ranking: chooses the groups that every layer keeps, from scores and a goal. Pure and deterministic.

Ties keep the lower index.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.goal import Goal
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.limits import Limits


def rank(
    scores: list[LayerScores], current: ModelShape, goal: Goal, fraction: float
) -> list[LayerKeep]:
    """Chooses the groups that every layer keeps after this fraction of the way to the goal.

    `uniform` keeps the best groups of each layer by its own scores (the paper's ranking).
    `scores` and the result belong to the current groups.
    """
    if goal.limits.uniform:
        return keep_best(scores, goal.shape_at(fraction).counts, current)
    return rank_global(scores, current, goal.limits, goal.leaving_at(fraction))


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
    scores: list[LayerScores], current: ModelShape, limits: Limits, leaving: Mapping[Kind, float]
) -> list[LayerKeep]:
    """Removes the least important groups of all open layers, until so many linear parameters of each kind have left.

    Channels make up for what heads miss, so the total ends within one group (or multiple). Channels that an earlier cut
    removed cannot return, so the total may exceed it by half a multiple.
    """
    removal = _Removal(scores, current, limits)
    *coarse, fine = current.kinds  # from the largest groups to the smallest
    for kind in coarse:
        removal.take(kind, leaving[kind])
    of_coarse = sum(removal.gone[kind] for kind in coarse)
    removal.take(fine, sum(leaving.values()) - of_coarse)
    return keep_best(scores, removal.left, current)


class _Removal:
    """Takes chunks of groups one by one, least important first, within the limits. It only counts them."""

    def __init__(self, scores: list[LayerScores], current: ModelShape, limits: Limits) -> None:
        self.scores = scores
        self.current = current
        self.limits = limits
        self.left = [dict(layer) for layer in current.counts]
        self.gone = limits.gone_of(current.counts)  # linear parameters, with earlier cuts

    def take(self, kind: Kind, leaving: float) -> None:
        """Removes groups of a kind while this brings what has left of it nearer to so many parameters."""
        leaving = round(leaving)
        numel = self.limits.dense.group_numel[kind]
        for layer, groups in self._candidates(kind):
            if self.gone[kind] + numel / 2 > leaving:
                return
            if self.gone[kind] + groups * numel / 2 <= leaving:
                self.left[layer][kind] -= groups
                self.gone[kind] += groups * numel

    def _candidates(self, kind: Kind) -> list[tuple[int, int]]:
        """Lists (layer, groups) of all chunks of a kind by ascending mean score. Ties: the last layer first."""
        candidates: list[tuple[int, int]] = []
        means: list[Tensor] = []
        for layer in reversed(self.limits.open_layers):
            count = self.left[layer][kind]
            chunks = _chunks(count, self.limits.floor[layer][kind], self.limits.multiples[kind])
            candidates += [(layer, groups) for groups in chunks]
            values = self.scores[layer][kind]
            ranges = self.current.layers[layer].ranges.get(kind, 1)
            best = best_first(values, ranges)[:count]
            ascending = values[best].flip(0)
            means.append(_chunk_means(ascending, chunks))
        order = torch.cat(means).argsort(stable=True)
        return [candidates[position] for position in cast(Any, order).tolist()]


def _chunks(count: int, floor: int, multiple: int) -> list[int]:
    """Returns the groups of each chunk from `count` down to the floor."""
    if count <= floor:
        return []
    first = count % multiple or multiple
    return [first] + [multiple] * ((count - first - floor) // multiple)


def _chunk_means(scores: Tensor, chunks: list[int]) -> Tensor:
    """Returns (chunks,): the mean of each chunk of ascending scores. All chunks but the first have one size."""
    if not chunks:
        return scores[:0]
    first = scores[: chunks[0]].mean()
    rest = scores[chunks[0] : sum(chunks)].view(-1, chunks[-1])
    means = torch.cat([first[None], rest.mean(1)])
    return means.cummax(0).values  # rounding must not let a chunk leave before the one below it
