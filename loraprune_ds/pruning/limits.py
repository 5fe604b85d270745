"""Limits of pruning for each layer: protected layers and minimum widths."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import Kind, LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.units import format_percent

Bounds = tuple[LayerCounts, LayerCounts]  # the fewest and the most groups of each kind in every open layer


@dataclass(frozen=True)
class Limits:
    """Holds the limits on each layer, fixed at the start of a run."""

    dense: ModelShape
    floor: tuple[LayerCounts, ...]  # fewest groups that each layer keeps. A protected layer keeps all
    open_layers: list[int]  # layers that are not protected
    multiples: Mapping[Kind, int]  # kept counts are multiples of these, unless they are dense counts
    shares: Mapping[Kind, float]  # each kind's fraction of the removed parameters
    ratio: float  # removed fraction of the dense linear parameters at the end

    def leaving(self, ratio: float) -> float:
        """Counts the linear parameters to remove."""
        return ratio * self.dense.linear_numel()

    def chunks(self, layer: int, kind: Kind, count: int) -> list[int]:
        """Returns the groups of each chunk from `count` down to the floor."""
        multiple, floor = self.multiples[kind], self.floor[layer][kind]
        if count <= floor:
            return []
        first = count % multiple or multiple
        return [first] + [multiple] * ((count - first - floor) // multiple)

    @cached_property
    def open_counts(self) -> LayerCounts:
        """The dense counts of each kind. `uniform` needs them to be equal in all open layers that have the kind."""
        return self._widest(self.dense.counts)

    @cached_property
    def open_numel(self) -> dict[Kind, int]:
        """The linear parameters of one group, as config.json counts them, of every open layer that has such groups."""
        numel = dict.fromkeys(self.dense.kinds, 0)
        for i in self.open_layers:
            for kind in self.dense.counts[i].kinds:
                numel[kind] += self.dense.times(i, kind) * self.dense.group_numel(kind)
        return numel

    def within(self, counts: Mapping[Kind, int], layer: int) -> LayerCounts:
        """Selects the kinds of a layer from equal counts."""
        own = self.dense.counts[layer].items()
        return LayerCounts((kind, counts[kind] * self.dense.times(layer, kind) if n else 0) for kind, n in own)

    def lost_by_all(self, counts: Mapping[Kind, int]) -> int:
        """Counts the linear parameters that open layers with these equal counts have lost."""
        dense = self.open_counts
        return sum(numel * (dense[kind] - counts[kind]) for kind, numel in self.open_numel.items())

    @property
    def bounds(self) -> Bounds:
        """The equal counts that all open layers may have."""
        return self._widest(self.floor), self.open_counts

    def narrowest(self, bounds: Bounds) -> Iterator[LayerCounts]:
        """Yields for each count of heads the equal counts of all open layers with the fewest channels (or experts)."""
        (least, most), as_many = bounds, self.dense.family.as_many
        coarse = [kind for kind in self.dense.kinds[:-1] if kind not in as_many]
        for counts in product(*(range(least[kind], most[kind] + 1, self.multiples[kind]) for kind in coarse)):
            found = {**least, **dict(zip(coarse, counts, strict=True))}
            yield LayerCounts(found | {kind: min(found[other], most[kind]) for kind, other in as_many.items()})

    def _widest(self, layers: Sequence[LayerCounts]) -> LayerCounts:
        times = self.dense.times
        return LayerCounts((x, max(layers[i][x] // times(i, x) for i in self.open_layers)) for x in self.dense.kinds)

    def step_numel(self, kind: Kind) -> int:
        """Counts the linear parameters of one multiple of a kind."""
        return self.multiples[kind] * self.dense.group_numel(kind)

    def lost(self, layer: int, counts: Mapping[Kind, int]) -> int:
        """Counts the linear parameters that a layer with these counts has lost."""
        return self.dense.numel_of(self.dense.counts[layer]) - self.dense.numel_of(counts)


def limits_without_ratio(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits that do not depend on the ratio. All kinds lose the same fraction of their parameters."""
    count, protected = len(dense.layers), set[int]()
    for layers in dense.layer_lists:
        first = -(-len(layers) // 10) if config.protected_first is None else config.protected_first
        protected |= {*layers[:first], *layers[max(0, len(layers) - config.protected_last) :]}
    if len(protected) == count:
        raise UserError(f"prune.protected_first and prune.protected_last protect all {count} layers")
    multiples = _multiples(config, dense, protected)
    least_experts = max(1, dense.mixture.least_experts if dense.mixture else 0)
    least = {kind: _round_up(least_experts if kind == "experts" else 1, n) for kind, n in multiples.items()}
    floor = list[LayerCounts]()
    for i, layer in enumerate(dense.counts):
        fixed = layer.keys() if i in protected else dense.family.fixed
        few = {kind: min(least[kind] * dense.times(i, kind), n) for kind, n in layer.items() if kind not in fixed}
        floor.append(LayerCounts(layer | few))
    open_layers = [i for i in range(count) if i not in protected]
    limits = Limits(dense, tuple(floor), open_layers, multiples, shares={}, ratio=0.0)
    counts = (limits.within(limits.open_counts, i) == dense.counts[i] for i in limits.open_layers)
    if config.ranking == "uniform" and not all(counts):
        raise UserError("prune.ranking: uniform needs equal layers, but the layers of this model differ; use global")
    numel = _open_numel(limits)[0]
    if dense.mixture:  # such models have few heads, which stay
        numel |= dict.fromkeys(dense.kinds[:-1], 0)
    return replace(limits, shares={kind: part / max(1, sum(numel.values())) for kind, part in numel.items()})


def _multiples(config: PruneConfig, dense: ModelShape, protected: set[int]) -> dict[Kind, int]:
    """Returns the divisor of the kept counts of each kind. Dense counts must be divisible by the servers, too."""
    servers, multiple = config.tensor_parallel, math.lcm(config.channel_multiple, config.tensor_parallel)
    odd = f"prune.tensor_parallel {servers} does not divide the"
    if dense.mixture and dense.mixture.expert_size % servers:
        raise UserError(f"{odd} {dense.mixture.expert_size} channels of an expert")
    for i, layer in enumerate(dense.counts):
        for kind, count in layer.items():
            if kind != "experts" and count % servers:
                raise UserError(f"{odd} {count} {kind} of layer {i}")
        if i not in protected and layer.get("channels", multiple) < multiple:
            keys = f"prune.channel_multiple {config.channel_multiple}"
            keys += f" with prune.tensor_parallel {servers}" if multiple > config.channel_multiple else ""
            raise UserError(f"{keys} needs at least {multiple} channels, and layer {i} has {layer['channels']}")
    multiples = {"heads": servers, "cross_heads": servers, "delta": servers, "channels": multiple}
    return {kind: multiples.get(kind, dense.ranges(kind)) for kind in dense.kinds}


def with_ratio(config: PruneConfig, limits: Limits, ratio: float) -> Limits:
    """Sets the ratio, and the shares that follow from it. Raises UserError if it conflicts with `prune.head_ratio`."""
    dense, head_ratio = limits.dense, config.head_ratio
    if head_ratio is None:
        return replace(limits, ratio=ratio)
    keeps = f"prune.head_ratio {head_ratio}: a {dense.model_type} keeps its heads; remove the setting"
    require("heads" in dense.kinds or head_ratio == 0, keeps)
    numel, removable = _open_numel(limits)
    *coarse, fine = dense.kinds
    others, most_others = numel.pop(fine), removable.pop(fine)
    heads, most_heads = sum(numel.values()), sum(removable.values())  # including the heads of delta nets
    leaving, of_heads = max(1, limits.leaving(ratio)), head_ratio * heads
    half_a_step = sum(limits.open_numel[kind] * limits.multiples[kind] for kind in coarse) / 2  # only full heads go
    if of_heads > most_heads + half_a_step:
        raise UserError(f"prune.head_ratio {head_ratio}: at most {most_heads / heads:.1%} of the heads may leave")
    if not of_heads <= leaving <= of_heads + most_others + half_a_step:
        raise UserError(
            f"prune.head_ratio {head_ratio} with prune.ratio {ratio} would remove {(leaving - of_heads) / others:.1%} "
            f"of the {fine}, but only {most_others / others:.1%} may leave"
        )
    shares = {kind: head_ratio * part / leaving for kind, part in numel.items()}
    return replace(limits, ratio=ratio, shares=shares | {fine: 1 - of_heads / leaving})


def resolve_refit(config: PruneConfig, limits: Limits) -> PruneConfig:
    """Fills in `prune.compensate`. Raises UserError if it is set although only experts leave."""
    refits = any(share > 0 for kind, share in limits.shares.items() if kind != "experts")
    if config.compensate is None:
        return replace(config, compensate="least_squares" if refits else "none")
    require(
        refits or config.compensate == "none",
        f"prune.compensate: {config.compensate} makes up for heads and channels, but here only experts leave; "
        "set prune.head_ratio, or remove prune.compensate",
    )
    return config


def reachable(config: PruneConfig, limits: Limits) -> tuple[float, float]:
    """Returns the least and the most parameters that can leave, up to a fraction of a group."""
    numel, removable = _open_numel(limits)
    most, fine = sum(removable.values()), limits.dense.kinds[-1]
    if config.head_ratio is None:
        return 0, most
    of_heads = config.head_ratio * (sum(numel.values()) - numel[fine])
    return of_heads, min(most, of_heads + removable[fine])


def check_reachable(config: PruneConfig, limits: Limits) -> None:
    """Raises UserError if the ratio is out of reach. The message names the largest ratio."""
    dense, (_, most) = limits.dense, reachable(config, limits)
    # The largest ratio may be missed: `global` by a group, `uniform` by half a multiple of channels per layer.
    if config.ranking != "uniform":
        near = max(limits.step_numel(kind) for kind in dense.kinds[:-1])
    else:
        fine = dense.kinds[-1]
        first = max(limits.open_layers, key=lambda i: dense.counts[i][fine])
        step = min(limits.multiples[fine], dense.counts[first][fine] - limits.floor[first][fine])
        near = step * limits.open_numel[fine] / 2
    if most == 0 or limits.ratio * dense.linear_numel() > most + near:
        largest = math.floor(1e4 * most / dense.linear_numel()) / 1e4
        cause = f"with the protected layers and minimum widths at most {largest} can leave"
        raise UserError(f"prune.{'sizes' if config.sizes else 'ratio'} {limits.ratio} is out of reach: {cause}")


def shortfall(config: PruneConfig, limits: Limits, reached: float) -> str | None:
    """Says how far a run ends below its ratio. None within the largest step of its ranking."""
    if config.ranking == "uniform":
        step = max(limits.multiples[kind] * numel for kind, numel in limits.open_numel.items())
    else:
        step = max(map(limits.step_numel, limits.dense.kinds))
    if (limits.ratio - reached) * limits.dense.linear_numel() <= step:
        return None
    removed, asked = format_percent(reached), format_percent(limits.ratio)
    return f"the run ends with {removed} of the linear parameters removed; its last cut was to reach {asked}"


def _open_numel(limits: Limits) -> tuple[dict[Kind, int], dict[Kind, int]]:
    """Counts the parameters of each kind in the open layers: all of them, and above the floors."""
    kinds = [(kind, limits.dense.group_numel(kind)) for kind in limits.dense.kinds]
    dense, floor = (
        {kind: numel * sum(layers[i][kind] for i in limits.open_layers) for kind, numel in kinds}
        for layers in (limits.dense.counts, limits.floor)
    )
    return dense, {kind: dense[kind] - floor[kind] for kind in dense}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
