"""How much of each kind leaves in the end, from `prune.ratio` or `prune.target`, and how much on the way there."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Amount
from loraprune_ds.errors import require
from loraprune_ds.model.groups import EQUAL_LAYERS, Kind, LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.limits import Limits, make_limits
from loraprune_ds.pruning.target import measure
from loraprune_ds.units import format_percent


@dataclass(frozen=True)
class Goal:
    """Decides what a run removes in the end, and what it has removed after a fraction of the way."""

    config: PruneConfig
    limits: Limits
    ratio: float  # removed fraction of the dense linear parameters

    @cached_property
    def leaving(self) -> dict[Kind, float]:
        """The linear parameters of each kind that leave in the end, as far as the floors allow.

        Heads and delta nets lose `prune.head_ratio`, and the finest kind gives the rest. Without it all kinds lose the
        same fraction, of a mixture only experts, and heads give what the finest kind cannot.
        """
        dense = self.limits.dense
        removable = self.limits.removable
        *coarse, fine = dense.kinds
        total = self.ratio * dense.linear_numel()
        share = self.config.head_ratio
        makes_up = [fine]
        if share is None:
            share = total / max(1, sum(self.limits.dense_numel.values()))
            share *= not dense.mixture
            makes_up += coarse
        leaving = dict.fromkeys(dense.kinds, 0.0)
        for kind in coarse:
            leaving[kind] = min(share * self.limits.dense_numel[kind], removable[kind])
        for kind in makes_up:
            rest = max(0, total - sum(leaving.values()))
            leaving[kind] = min(leaving[kind] + rest, removable[kind])
        return leaving

    @property
    def numel(self) -> float:
        """The linear parameters that leave in the end."""
        return sum(self.leaving.values())

    @cached_property
    def equal_counts(self) -> LayerCounts:
        """The counts of every open layer in the end, if all have the same.

        Channels make up for what heads cannot reach, to within half a step. Of such counts those of the heads are
        nearest to what heads should lose.
        """
        limits = self.limits
        *coarse, fine = limits.most
        counts: dict[Kind, int] = {}
        rest = self.numel
        room = sum(limits.removable.values())
        for kind in coarse:
            most = limits.most[kind]
            numel = limits.equal_numel[kind]
            room -= numel * (most - limits.least[kind])
            counts[kind] = self._nearest(kind, rest, room)
            rest -= numel * (most - counts[kind])
        count = limits.most[fine] - rest / max(1, limits.equal_numel[fine])
        counts[fine] = limits.nearest(fine, count)
        return LayerCounts(counts)

    def _nearest(self, kind: Kind, rest: float, room: int) -> int:
        """Chooses the count of heads if `rest` parameters must leave, and at most `room` of finer kinds."""
        limits = self.limits
        most = limits.most[kind]
        stays = 1 - self.leaving[kind] / max(1, limits.dense_numel[kind])
        half_a_step = limits.step_numel(limits.dense.kinds[-1]) / 2

        def distances(count: int) -> tuple[float, float]:
            still = rest - limits.equal_numel[kind] * (most - count)
            return max(-still, still - room, half_a_step), abs(count - stays * most)

        return min(range(limits.least[kind], most + 1, limits.multiples[kind]), key=distances)

    # On the way

    def leaving_at(self, fraction: float) -> dict[Kind, float]:
        """Returns the linear parameters of each kind that have left after this fraction of the way."""
        return {kind: fraction * numel for kind, numel in self.leaving.items()}

    def counts_at(self, fraction: float) -> LayerCounts:
        """Returns the equal counts after this fraction of the way. They never grow."""
        counts: dict[Kind, int] = {}
        for kind, most in self.limits.most.items():
            end = self.equal_counts[kind]
            count = most - round(fraction * (most - end))
            counts[kind] = max(end, self.limits.nearest(kind, count))
        return LayerCounts(counts)

    def shape_at(self, fraction: float) -> ModelShape:
        """Returns the shape after this fraction of the way. For `global` as if all layers lost the same."""
        limits = self.limits
        if limits.uniform:
            return limits.with_equal(self.counts_at(fraction))
        layers = [dict(layer) for layer in limits.dense.counts]
        for kind, leaving in self.leaving_at(fraction).items():
            stays = 1 - leaving / max(1, limits.dense_numel[kind])
            left = 0.0  # a fraction of a group goes to the next layer
            for i in limits.open_layers:
                left += stays * layers[i][kind]
                layers[i][kind] = max(limits.floor[i][kind], round(left))
                left -= layers[i][kind]
        return limits.dense.resized(list(map(LayerCounts, layers)))

    @property
    def final_shape(self) -> ModelShape | None:
        """The shape in the end. None if scores decide what each layer keeps."""
        return self.shape_at(1) if self.limits.uniform else None

    def shortfall(self, pruned: ModelShape) -> str | None:
        """Says how far a run ends below its ratio. None within the largest step of its ranking."""
        limits = self.limits
        reached = limits.gone(pruned)
        largest_step = max(map(limits.step_numel, limits.most))
        if (self.ratio - reached) * limits.dense.linear_numel() <= largest_step:
            return None
        return (
            f"the run ends with {format_percent(reached)} of the linear parameters removed; "
            f"its last cut was to reach {format_percent(self.ratio)}"
        )


def make_goal(config: PruneConfig, dense: ModelShape, *, tower: bool = False) -> Goal:
    """Fills in `prune.ranking` and `prune.compensate`, and decides what a run removes.

    Args:
        tower: True if the result has the tower of a multimodal model.

    Raises:
        UserError: settings conflict or do not fit the model, or a ratio or target is out of reach. The message names
            what can be reached.
    """
    needs_equal = dense.family.equal_layers
    if config.ranking is None:
        config = replace(config, ranking="uniform" if tower or needs_equal else "global")
    limits = make_limits(config, dense)
    goal = Goal(config, limits, config.ratio or 0.0)
    _check_heads(goal)
    target = config.target_amount
    if target is None:
        _check_ratio(goal)
    else:
        goal = replace(goal, ratio=_find_ratio(goal, target))
    if needs_equal:
        final = goal.final_shape
        require(
            final is not None and final.is_uniform,
            f"{dense.model_type} needs layers of one size: set {EQUAL_LAYERS}",
        )
    refits = any(numel for kind, numel in goal.leaving.items() if kind != "experts")
    if config.compensate is None:
        config = replace(config, compensate="least_squares" if refits else "none")
    return replace(goal, config=config)


def _check_heads(goal: Goal) -> None:
    """Raises UserError if heads and delta nets cannot lose `prune.head_ratio`."""
    limits = goal.limits
    asked = goal.config.head_ratio or 0
    kinds = [kind for kind in limits.dense.kinds[:-1] if kind != "channels"]
    heads = sum(limits.dense_numel[kind] for kind in kinds)
    most = sum(limits.removable[kind] for kind in kinds) / max(1, heads)
    name = limits.dense.model_type
    require(
        asked <= most,
        f"prune.head_ratio {asked}: at most {_round_down(most)} of the heads of {name} may leave",
    )


def _check_ratio(goal: Goal) -> None:
    """Raises UserError if the ratio is out of reach."""
    numel = goal.limits.dense.linear_numel()
    least, most = (leaving / numel for leaving in _reachable(goal))
    lowest = math.ceil(1e4 * least) / 1e4
    require(
        least <= goal.ratio <= most,
        f"prune.ratio {goal.ratio} {_why(goal)} at least {lowest} and at most {_round_down(most)} can leave",
    )


def _round_down(ratio: float) -> float:
    """Rounds to four digits. A user can set the result."""
    return math.floor(1e4 * ratio) / 1e4


def _find_ratio(goal: Goal, target: Amount) -> float:
    """Finds the smallest ratio that reaches a number of parameters or the memory of a server.

    `uniform` ends at or below the target, within one step of its widths. `global` ends within one group of the target.
    """
    numel = goal.limits.dense.linear_numel()
    least, most = _reachable(goal)
    leaving = range(math.ceil(least), int(most) + 1)

    def size(leaving: int) -> float:
        shape = replace(goal, ratio=leaving / numel).shape_at(1)
        return measure(goal.config, shape, target)

    place = bisect_left(leaving, True, key=lambda numel: size(numel) <= target.value)
    smallest, largest = (target.format(size(leaving[end])) for end in (-1, 0))
    require(
        0 < place < len(leaving),
        f"prune.target {goal.config.target} {_why(goal)} at least {smallest} and at most {largest} stay",
    )
    return leaving[place] / numel


def _reachable(goal: Goal) -> list[float]:
    """Returns the fewest and the most linear parameters that can leave."""
    return [replace(goal, ratio=ratio).numel for ratio in (0.0, 1.0)]


def _why(goal: Goal) -> str:
    """Names what limits a run, in an error."""
    heads = goal.config.head_ratio
    with_heads = "" if heads is None else f" and prune.head_ratio {heads}"
    return f"is out of reach: with the protected layers, minimum widths{with_heads}"
