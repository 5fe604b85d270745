"""Ranking: from scores and a target to the groups that every layer keeps. Pure and deterministic.

The target is a fraction of the linear parameters of all decoder layers of the *dense* model. Ties keep the lower index.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.model.family_row import WITHIN, Kind
from loraprune_ds.model.per_kind import LayerKeep, LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.slices import group_indices
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.limits import Limits


def rank_uniform(
    scores: list[LayerScores], current: ModelShape, limits: Limits, target: float, final: float
) -> list[LayerKeep]:
    """Keeps equal counts in every open layer, the best groups of each by its own scores (the paper's ranking).

    The final counts come nearest to `final`. Channels make up for what whole heads cannot. On the way all kinds are
    cut in proportion, so that no count ever has to grow again.

    Args:
        scores: of every layer's groups of now. A group with a higher score stays longer.
        current: the shape of now.
        target: fraction of the dense linear parameters that should be gone after this cut.
        final: the same after the last cut.

    Returns:
        Per layer, indices into its groups of now.
    """
    counts = uniform_counts(limits, target, final)
    wanted = [counts if i in limits.open_layers else layer for i, layer in enumerate(current.layers)]
    return _keep_best(scores, wanted, current)


def uniform_counts(limits: Limits, target: float, final: float) -> LayerShape:
    """Returns the counts that every open layer keeps when `target` is due on the way to `final`."""
    return counts_on_the_way(limits, uniform_goal(limits, final), target / final)


def counts_on_the_way(limits: Limits, goal: LayerShape, part: float) -> LayerShape:
    """Returns the counts once `part` of the way from the dense ones to `goal` is due. They never grow with it."""
    dense = limits.dense.layers[limits.open_layers[0]]
    counts = {kind: count - round(part * (count - goal[kind])) for kind, count in dense.items()}
    return LayerShape(
        (kind, _nearest_multiple(count, goal[kind], dense[kind], limits.multiples.get(kind, 1)))
        for kind, count in counts.items()
    )


def uniform_goal(limits: Limits, ratio: float) -> LayerShape:
    """Returns the counts that every open layer keeps at the end, as near to `ratio` as whole groups get.

    Heads give their share as nearly as they can. Floors, the cap or too few channels may then leave the target missed
    by more than half a step of the channels. In that case heads give another share.
    """
    dense, first = limits.dense, limits.open_layers[0]
    layer, (*coarse, fine) = dense.layers[first], dense.kinds
    wanted = ratio * dense.linear_numel() / len(limits.open_layers)  # parameters that each open layer loses
    # What would stay of the others if each gave just its share.
    share = {kind: layer[kind] - wanted * limits.shares[kind] / dense.group_numel(kind, layer) for kind in coarse}
    options: list[tuple[float, float, LayerShape]] = []
    multiple = limits.multiples[fine]
    near = limits.step_numel(fine, layer) / 2
    for narrowest in limits.narrowest(first):
        channel = dense.group_numel(fine, narrowest)
        exact = layer[fine] - (wanted - limits.lost(first, {**narrowest, fine: layer[fine]})) / channel
        channels = _nearest_multiple(exact, narrowest[fine], layer[fine], multiple)
        counts = LayerShape({**narrowest, fine: channels})
        distance = max(abs(limits.lost(first, counts) - wanted), near)
        options.append((distance, sum(abs(counts[kind] - share[kind]) for kind in coarse), counts))
    return min(options, key=lambda option: option[:2])[-1]


def _nearest_multiple(count: float, lowest: int, highest: int, multiple: int) -> int:
    """Returns the multiple nearest to `count` between the bounds, or one of them."""
    below = math.floor(count / multiple) * multiple
    return min((min(max(c, lowest), highest) for c in (below, below + multiple)), key=lambda c: abs(c - count))


def _keep_best(scores: list[LayerScores], counts: Sequence[Mapping[Kind, int]], current: ModelShape) -> list[LayerKeep]:
    """Keeps so many groups of every layer, those with the highest scores. Among equals the lower index stays."""
    found: list[LayerKeep] = []
    for layer, wanted in zip(scores, counts, strict=True):
        groups, keep = LayerShape(wanted).groups, dict[Kind, Tensor]()
        for kind in current.kinds:
            keep[kind] = _best_first_within(layer, kind, keep, current)[: groups[kind]].sort().values
        found.append(LayerKeep(keep))
    return found


def _best_first_within(scores: LayerScores, kind: Kind, keep: Mapping[Kind, Tensor], current: ModelShape) -> Tensor:
    """Returns the groups of a kind that may stay, the best first. Each expert that stays keeps as many channels.

    Args:
        keep: the groups that stay of the kinds before it.
    """
    values = scores[kind]
    if kind not in WITHIN:
        return best_first(values, current.parts_of(kind))
    holders = WITHIN[kind]
    inside = group_indices(keep[holders], len(values) // max(1, len(scores[holders])))
    return inside[best_first(values[inside], max(1, len(keep[holders])))]


def best_first(scores: Tensor, parts: int) -> Tensor:
    """Returns the indices of all groups, the best first. Among equals the lower index comes first.

    Args:
        parts: equal ranges of the groups. The best of each come first, then the second best of each, and so on.
    """
    ranges = scores.view(parts, len(scores) // parts)
    order = ranges.argsort(descending=True, stable=True) + torch.arange(parts)[:, None] * ranges.shape[1]
    return order.T.flatten()


def rank_global(
    scores: list[LayerScores], current: ModelShape, limits: Limits, target: float, *, joint: bool
) -> list[LayerKeep]:
    """Removes the least important groups of all open layers until the budget is spent.

    Separate budgets (the default): heads give their share of the target, channels the rest. Joint: all compete by
    score per parameter. The total stops within one group of the target, or one multiple of them. With separate budgets
    it may pass it by half a multiple of channels more: those that stood in for a head do not come back.

    Args, returns: as `rank_uniform`; `joint` as `prune.joint_budget`.
    """
    removal = _Removal(scores, current, limits)
    budget = round(target * limits.dense.linear_numel())
    if joint:
        removal.take(current.kinds, budget)
    else:
        *coarse, fine = current.kinds
        for kind in coarse:
            removal.take([kind], round(budget * limits.shares[kind]) + removal.gone_beside(kind))
        removal.take([fine], budget)
        if budget - sum(removal.lost) > limits.step_numel(fine) / 2:  # floors or caps stopped the finest
            for kind in coarse:
                removal.take([kind], budget)
    return _keep_best(scores, removal.left, current)


@dataclass
class _Removal:
    """Takes blocks of groups one by one, least important first, within the limits.

    It keeps counts only. Which groups of a layer go follows from its own scores.
    """

    scores: list[LayerScores]
    current: ModelShape
    limits: Limits
    left: list[dict[Kind, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.left = [dict(layer) for layer in self.current.layers]
        self.lost = [self.limits.lost(i, left) for i, left in enumerate(self.left)]

    def gone_beside(self, kind: Kind) -> int:
        """Returns the parameters of the other kinds that are gone so far, earlier cuts included."""
        layers = zip(self.limits.dense.layers, self.left, strict=True)
        numel = self.limits.dense.group_numel
        return sum(self.lost) - sum((dense[kind] - left[kind]) * numel(kind, dense) for dense, left in layers)

    def take(self, kinds: Sequence[Kind], budget: int) -> None:
        """Removes groups while that brings the parameters gone so far nearer to `budget`."""
        gone, numel = sum(self.lost), self.limits.dense.group_numel
        smallest = min(numel(kind, self.left[i]) for kind in kinds for i in self.limits.open_layers)
        for layer, kind, groups in self._candidates(kinds):
            if gone + smallest / 2 > budget:
                return
            size = groups * numel(kind, self.left[layer])
            if gone + size / 2 <= budget and self.lost[layer] + size <= self.limits.layer_budget[layer]:
                self.left[layer][kind] -= groups
                self.lost[layer] += size
                gone += size

    def _candidates(self, kinds: Sequence[Kind]) -> list[tuple[int, Kind, int]]:
        """Lists (layer, kind, groups) of all blocks by ascending score per parameter. Equals: the last layer first.

        The blocks of a layer come in the order in which they must leave, as their scores ascend.
        """
        candidates: list[tuple[int, Kind, int]] = []
        per_parameter: list[Tensor] = []
        for layer in reversed(self.limits.open_layers):
            for kind in kinds:
                left = LayerShape(self.left[layer])
                blocks = self.limits.blocks(layer, kind, left[kind])
                candidates.extend((layer, kind, groups) for groups in blocks)
                keep = {WITHIN[kind]: self._kept(layer, WITHIN[kind])} if kind in WITHIN else {}
                best = _best_first_within(self.scores[layer], kind, keep, self.current)[: left.groups[kind]]
                each = left.groups[kind] // max(1, left[kind])  # groups that one of `left` stands for
                means = _block_means(self.scores[layer][kind][best].flip(0), [each * block for block in blocks])
                per_parameter.append(means * each / self.limits.dense.group_numel(kind, left))
        order = cast(list[int], torch.cat(per_parameter).argsort(stable=True).tolist())
        return [candidates[position] for position in order]

    def _kept(self, layer: int, kind: Kind) -> Tensor:
        """Returns the groups of a kind that stay so far. It lies within no other."""
        best = best_first(self.scores[layer][kind], self.current.parts_of(kind))
        return best[: self.left[layer][kind]].sort().values


def _block_means(scores: Tensor, blocks: list[int]) -> Tensor:
    """Returns (blocks,): the mean of each block of ascending scores. All blocks but the first are of one size."""
    if not blocks:
        return scores[:0]
    first, rest = scores[: blocks[0]], scores[blocks[0] : sum(blocks)]
    means = torch.cat([first.mean()[None], rest.view(-1, blocks[-1]).mean(1)])
    return means.cummax(0).values  # rounding must not let a block leave before the one below it
