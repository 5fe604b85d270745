"""Which groups go: from scores and a target to the groups that every layer keeps. Pure and deterministic.

The target is a fraction of the linear parameters of all decoder layers of the *dense* model. Ties keep the lower index.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraprune_ds.model.shapes import KINDS, Kind, LayerShape, ModelShape
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.zero.store import LayerKeep


def rank_uniform(
    scores: list[LayerScores], current: ModelShape, limits: Limits, target: float, final: float
) -> list[LayerKeep]:
    """Equal counts in every open layer, the best groups of each by its own scores (the paper's ranking).

    The final counts come nearest to `final`, channels making up what whole heads cannot; on the way there both kinds
    are cut in proportion, so that no count ever has to grow again.
    """
    counts = uniform_counts(limits, target, final)
    keep = []
    for i, layer in enumerate(current.layers):
        wanted = counts if i in limits.open_layers else layer
        best = (_best(scores[i].of(kind), min(wanted.count(kind), layer.count(kind))) for kind in KINDS)
        keep.append(LayerKeep(*best))
    return keep


def uniform_counts(limits: Limits, target: float, final: float) -> LayerShape:
    """The counts every open layer keeps when `target` of the way to `final` is due."""
    dense, goal = limits.dense.layers[limits.open_layers[0]], uniform_goal(limits, final)
    if target >= final:
        return goal
    heads, channels = (dense.count(k) - round(target / final * (dense.count(k) - goal.count(k))) for k in KINDS)
    return LayerShape(heads, _to_multiple(channels, goal.channels, limits.multiple))


def uniform_goal(limits: Limits, ratio: float) -> LayerShape:
    """The counts every open layer keeps at the end: as near to `ratio` of all linear parameters as whole groups get."""
    dense, first = limits.dense, limits.open_layers[0]
    layer, floor = dense.layers[first], limits.floor[first]
    head, channel = dense.group_numel("heads"), dense.group_numel("channels")
    loss = ratio * dense.linear_numel() / len(limits.open_layers)  # parameters that each open layer loses
    most_channels = layer.channels - floor.channels
    heads_gone = min(round(layer.heads * loss / dense.layer_numel(first)), layer.heads - floor.heads)
    while loss - heads_gone * head > most_channels * channel and heads_gone < layer.heads - floor.heads:
        heads_gone += 1  # channels have reached their floor, so heads give more
    channels_gone = min(max(0, round((loss - heads_gone * head) / channel)), most_channels)
    return LayerShape(
        layer.heads - heads_gone, _to_multiple(layer.channels - channels_gone, floor.channels, limits.multiple)
    )


def _to_multiple(count: int, floor: int, multiple: int) -> int:
    return max(round(count / multiple) * multiple, floor)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending; among equals the lower index stays."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def rank_global(
    scores: list[LayerScores], current: ModelShape, limits: Limits, target: float, *, joint: bool
) -> list[LayerKeep]:
    """The least important groups of all open layers go until the budget is spent.

    Separate budgets (the default): heads give their share of the target, channels the rest. Joint: both compete by
    score per parameter. Either way the total stops within one group of the target.
    """
    dense = limits.dense
    removal = _Removal(scores, current, limits)
    budget = round(target * dense.linear_numel())
    if joint:
        removal.take(KINDS, budget)
    else:
        head_share = sum(layer.heads for layer in dense.layers) * dense.group_numel("heads") / dense.linear_numel()
        removal.take(("heads",), round(budget * head_share) + removal.gone_of("channels"))
        removal.take(("channels",), budget)
        removal.take(("heads",), budget)  # where floors or caps stopped the channels
    return removal.keep()


@dataclass
class _Removal:
    """Takes groups one by one, least important first, within the limits."""

    scores: list[LayerScores]
    current: ModelShape
    limits: Limits
    removed: dict[tuple[int, Kind], set[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.removed = {(i, kind): set() for i in range(len(self.scores)) for kind in KINDS}
        self.lost = [self.limits.dense.layer_numel(i) - self.current.layer_numel(i) for i in range(len(self.scores))]

    def gone_of(self, kind: Kind) -> int:
        """Parameters of one kind that earlier cuts removed."""
        layers = zip(self.limits.dense.layers, self.current.layers, strict=True)
        return sum(d.count(kind) - c.count(kind) for d, c in layers) * self.limits.dense.group_numel(kind)

    def take(self, kinds: tuple[Kind, ...], budget: int) -> None:
        """Removes groups while that brings the parameters gone so far nearer to `budget`."""
        gone = sum(self.lost)
        smallest = min(self.limits.dense.group_numel(kind) for kind in kinds)
        for layer, kind, index in self._candidates(kinds):
            size = self.limits.dense.group_numel(kind)
            if gone + smallest / 2 > budget:
                return
            if gone + size / 2 <= budget and self._may_lose(layer, kind, index, size):
                self.removed[layer, kind].add(index)
                self.lost[layer] += size
                gone += size

    def keep(self) -> list[LayerKeep]:
        heads = [self._rest(i, "heads") for i in range(len(self.scores))]
        channels = self._rounded_channels([len(self._rest(i, "channels")) for i in range(len(self.scores))])
        return [
            LayerKeep(h, _best(scores.channels, n)) for h, scores, n in zip(heads, self.scores, channels, strict=True)
        ]

    def _candidates(self, kinds: tuple[Kind, ...]) -> list[tuple[int, Kind, int]]:
        """Groups of the open layers by score per parameter, ascending; among equals the higher index goes first."""
        sites: list[tuple[int, Kind, int]] = []
        per_parameter = []
        for layer in reversed(self.limits.open_layers):
            for kind in kinds:
                values = self.scores[layer].of(kind).flip(0)
                sites.extend((layer, kind, index) for index in range(len(values) - 1, -1, -1))
                per_parameter.append(values / self.limits.dense.group_numel(kind))
        order = torch.cat(per_parameter).argsort(stable=True).tolist()
        return [sites[position] for position in order]

    def _may_lose(self, layer: int, kind: Kind, index: int, size: int) -> bool:
        gone = self.removed[layer, kind]
        left = self.current.layers[layer].count(kind) - len(gone)
        above_floor = left > self.limits.floor[layer].count(kind)
        return index not in gone and above_floor and self.lost[layer] + size <= self.limits.layer_budget[layer]

    def _rest(self, layer: int, kind: Kind) -> Tensor:
        gone = self.removed[layer, kind]
        return torch.tensor([i for i in range(self.current.layers[layer].count(kind)) if i not in gone])

    def _rounded_channels(self, counts: list[int]) -> list[int]:
        """Counts of the layers that are cut, as multiples with (nearly) the same sum: largest remainders round up."""
        multiple = self.limits.multiple
        rounded = list(counts)
        cut = [i for i in self.limits.open_layers if counts[i] < self.limits.dense.layers[i].channels]
        units = round(sum(counts[i] for i in cut) / multiple)
        for i in cut:
            rounded[i] = counts[i] // multiple * multiple
        spare = units - sum(rounded[i] // multiple for i in cut)
        for i in sorted(cut, key=lambda i: (-(counts[i] % multiple), i))[: max(spare, 0)]:
            rounded[i] += multiple
        current = self.current.layers
        return [min(max(rounded[i], self.limits.floor[i].channels), current[i].channels) for i in range(len(counts))]
