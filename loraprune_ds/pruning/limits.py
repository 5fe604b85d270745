"""The two values that decide the counts of groups: the limits, which are fixed, and the budget, which is asked for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import QUERY_HEADS, Kind, LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.units import format_percent

# the fewest and the most groups of each kind in every open layer
Bounds = tuple[LayerCounts, LayerCounts]


@dataclass(frozen=True)
class Limits:
    """Holds the limits on the counts of each layer, however much a run removes."""

    dense: ModelShape
    # fewest groups that each layer keeps. A protected layer keeps all
    floor: tuple[LayerCounts, ...]
    open_layers: list[int]  # layers that are not protected
    # kept counts are multiples of these, unless they are dense counts
    multiples: Mapping[Kind, int]
    uniform: bool  # all open layers keep equal counts

    def leaving(self, ratio: float) -> float:
        """Counts the linear parameters that leave until this ratio is gone."""
        return ratio * self.dense.linear_numel()

    def gone(self, shape: ModelShape) -> float:
        """Returns the ratio that is gone from a shape."""
        return 1 - shape.linear_numel() / self.dense.linear_numel()

    def chunks(self, layer: int, kind: Kind, count: int) -> list[int]:
        """Returns the groups of each chunk from `count` down to the floor."""
        multiple, floor = self.multiples[kind], self.floor[layer][kind]
        if count <= floor:
            return []
        first = count % multiple or multiple
        return [first] + [multiple] * ((count - first - floor) // multiple)

    def numel(self, layers: Sequence[LayerCounts]) -> dict[Kind, int]:
        """Counts the linear parameters of each kind in the open layers, from the counts of all layers."""
        group_numel, kinds = self.dense.group_numel, self.dense.kinds
        return {
            kind: group_numel[kind] * sum(layers[i][kind] for i in self.open_layers)
            for kind in kinds
        }

    @cached_property
    def removable(self) -> dict[Kind, int]:
        """The linear parameters of each kind above the floors."""
        floor = self.numel(self.floor)
        return {kind: numel - floor[kind] for kind, numel in self.numel(self.dense.counts).items()}

    def step_numel(self, kind: Kind) -> int:
        """Counts the linear parameters of one multiple of a kind: in one layer, or with `uniform` in all open ones."""
        return self.multiples[kind] * (
            self.equal_numel[kind] if self.uniform else self.dense.group_numel[kind]
        )

    # Equal counts in all open layers, as config.json counts groups. A layer with twice as many loses twice as many.

    @cached_property
    def bounds(self) -> Bounds:
        """The fewest and the most groups that they may have."""
        times, layers, kinds = self.dense.times, self.open_layers, self.dense.kinds
        both = (self.floor, self.dense.counts)
        least, most = (
            LayerCounts((x, max(own[i][x] // times(i, x) for i in layers)) for x in kinds)
            for own in both
        )
        return least, most

    @cached_property
    def equal_numel(self) -> dict[Kind, int]:
        """The linear parameters of one group in every open layer that has such groups."""
        times, counts, layers = self.dense.times, self.dense.counts, self.open_layers
        groups = {
            kind: sum(times(i, kind) for i in layers if counts[i][kind])
            for kind in self.dense.kinds
        }
        return {kind: count * self.dense.group_numel[kind] for kind, count in groups.items()}

    def narrowest(self, bounds: Bounds) -> Iterator[LayerCounts]:
        """Yields for each count of heads the equal counts with the fewest channels (or experts)."""
        (least, most), as_many = bounds, self.dense.family.as_many
        coarse = [kind for kind in self.dense.kinds[:-1] if kind not in as_many]
        for counts in product(
            *(range(least[kind], most[kind] + 1, self.multiples[kind]) for kind in coarse)
        ):
            found = {**least, **dict(zip(coarse, counts, strict=True))}
            yield LayerCounts(
                found | {kind: min(found[other], most[kind]) for kind, other in as_many.items()}
            )

    def with_equal(self, counts: Mapping[Kind, int], shape: ModelShape) -> ModelShape:
        """Returns the shape with equal counts in every open layer. Layers with delta nets and with attention differ."""
        layers, times = list(shape.counts), self.dense.times
        for i in self.open_layers:
            own = self.dense.counts[i].items()
            layers[i] = LayerCounts(
                (kind, counts[kind] * times(i, kind) if n else 0) for kind, n in own
            )
        return shape.resized(layers)


@dataclass(frozen=True)
class Budget:
    """Holds what a run, one of its sizes or a cut removes."""

    ratio: float  # removed fraction of the dense linear parameters
    shares: Mapping[Kind, float]  # each kind's fraction of the removed parameters


def protected_layers(config: PruneConfig, dense: ModelShape) -> set[int]:
    protected = set[int]()
    for layers in dense.layer_lists:
        first = -(-len(layers) // 10) if config.protected_first is None else config.protected_first
        protected |= {*layers[:first], *layers[max(0, len(layers) - config.protected_last) :]}
    return protected


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits of a run. Raises UserError if settings conflict, or do not fit the model."""
    count, protected = len(dense.layers), protected_layers(config, dense)
    if len(protected) == count:
        raise UserError(
            f"prune.protected_first and prune.protected_last protect all {count} layers"
        )
    multiples = _multiples(config, dense, protected)
    least, floor = dict(multiples), list[LayerCounts]()
    if dense.mixture:
        least["experts"] *= math.ceil(dense.mixture.least_experts / least["experts"])
    for i, layer in enumerate(dense.counts):
        fixed = layer.keys() if i in protected else dense.family.fixed
        few = {
            kind: min(least[kind] * dense.times(i, kind), n)
            for kind, n in layer.items()
            if kind not in fixed
        }
        floor.append(LayerCounts(layer | few))
    open_layers = [i for i in range(count) if i not in protected]
    uniform = config.ranking == "uniform"
    limits = Limits(dense, tuple(floor), open_layers, multiples, uniform)
    if uniform and limits.with_equal(limits.bounds[1], dense).counts != dense.counts:
        raise UserError(
            "prune.ranking: uniform needs equal layers, but the layers of this model differ; use global"
        )
    return limits


def _multiples(config: PruneConfig, dense: ModelShape, protected: set[int]) -> dict[Kind, int]:
    """Returns the divisor of the kept counts of each kind. Dense counts must be divisible by the servers, too."""
    servers, multiple = (
        config.tensor_parallel,
        math.lcm(config.channel_multiple, config.tensor_parallel),
    )
    odd = f"prune.tensor_parallel {servers} does not divide the"
    if dense.mixture and dense.mixture.expert_size % servers:
        raise UserError(f"{odd} {dense.mixture.expert_size} channels of an expert")
    require(dense.has_heads_for(servers), f"{odd} key-value heads")
    for i, layer in enumerate(dense.counts):
        for kind, count in layer.items():
            if kind != "experts" and count % servers:
                raise UserError(f"{odd} {count} {kind} of layer {i}")
        if i not in protected and 0 < layer.get("channels", 0) < multiple:
            keys = f"prune.channel_multiple {config.channel_multiple}"
            keys += (
                f" with prune.tensor_parallel {servers}"
                if multiple > config.channel_multiple
                else ""
            )
            raise UserError(
                f"{keys} needs at least {multiple} channels, and layer {i} has {layer['channels']}"
            )
    multiples = {"heads": servers, "cross_heads": servers, "delta": servers, "channels": multiple}
    multiples |= {QUERY_HEADS: math.lcm(dense.ranges(QUERY_HEADS), servers)}
    return {kind: multiples.get(kind, dense.ranges(kind)) for kind in dense.kinds}


def make_budget(config: PruneConfig, limits: Limits, ratio: float) -> Budget:
    """Divides a ratio among the kinds. Raises UserError if it conflicts with `prune.head_ratio`.

    Without that setting all kinds lose the same fraction of their parameters. Of a mixture only experts leave.
    """
    dense, head_ratio, numel = limits.dense, config.head_ratio, limits.numel(limits.dense.counts)
    *coarse, fine = dense.kinds
    if head_ratio is None:
        if dense.mixture:  # such models have few heads, which stay
            numel |= dict.fromkeys(coarse, 0)
        return Budget(
            ratio, {kind: part / max(1, sum(numel.values())) for kind, part in numel.items()}
        )
    keeps = (
        f"prune.head_ratio {head_ratio}: a {dense.model_type} keeps its heads; remove the setting"
    )
    require(not {"heads", QUERY_HEADS}.isdisjoint(dense.kinds) or head_ratio == 0, keeps)
    # of delta nets, too
    heads, most_heads = (sum(x[kind] for kind in coarse) for x in (numel, limits.removable))
    others, most_others = max(1, numel[fine]), limits.removable[fine]
    leaving, of_heads = max(1, limits.leaving(ratio)), head_ratio * heads
    # only full heads go
    half_a_step = sum(limits.equal_numel[kind] * limits.multiples[kind] for kind in coarse) / 2
    if of_heads > most_heads + half_a_step:
        raise UserError(
            f"prune.head_ratio {head_ratio}: at most {most_heads / heads:.1%} of the heads may leave"
        )
    if not of_heads <= leaving <= of_heads + most_others + half_a_step:
        both, asked = (
            f"prune.head_ratio {head_ratio} with prune.ratio {ratio}",
            (leaving - of_heads) / others,
        )
        reason = (
            f"would remove {asked:.1%} of the {fine}, but only {most_others / others:.1%} may leave"
        )
        raise UserError(f"{both} {reason}")
    shares = {kind: head_ratio * numel[kind] / leaving for kind in coarse}
    return Budget(ratio, shares | {fine: 1 - of_heads / leaving})


def reachable(config: PruneConfig, limits: Limits) -> tuple[float, float]:
    """Returns the least and the most parameters that can leave, up to a fraction of a group."""
    *coarse, fine = limits.dense.kinds
    most = sum(limits.removable.values())
    if config.head_ratio is None:
        return 0, most
    numel = limits.numel(limits.dense.counts)
    of_heads = config.head_ratio * sum(numel[kind] for kind in coarse)
    return of_heads, min(most, of_heads + limits.removable[fine])


def check_reachable(config: PruneConfig, limits: Limits, ratio: float) -> None:
    """Raises UserError if the ratio is out of reach. The message names the largest ratio."""
    *coarse, fine = limits.dense.kinds
    _, most = reachable(config, limits)
    key, numel = (
        f"prune.{'sizes' if config.sizes else 'ratio'} {ratio}",
        limits.dense.linear_numel(),
    )
    # The largest ratio may be missed: `global` by a group, `uniform` by half a multiple of channels per layer.
    near = max(map(limits.step_numel, coarse), default=0)
    if limits.uniform:
        least, widest = (counts[fine] for counts in limits.bounds)
        near = min(limits.step_numel(fine), (widest - least) * limits.equal_numel[fine]) / 2
    if most == 0 or limits.leaving(ratio) > most + near:
        largest = math.floor(1e4 * most / numel) / 1e4
        cause = f"with the protected layers and minimum widths at most {largest} can leave"
        raise UserError(f"{key} is out of reach: {cause}")


def shortfall(limits: Limits, asked: float, reached: float) -> str | None:
    """Says how far a run ends below the ratio that it was asked for. None within the largest step of its ranking."""
    if (asked - reached) * limits.dense.linear_numel() <= max(
        map(limits.step_numel, limits.dense.kinds)
    ):
        return None
    ends, asks = format_percent(reached), format_percent(asked)
    return f"the run ends with {ends} of the linear parameters removed; its last cut was to reach {asks}"
