"""`Limits`: what may leave at all. `Budget`: how much shall leave, and of which kind."""

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
        """Returns how many linear parameters the cuts must remove to reach this ratio."""
        return ratio * self.dense.linear_numel()

    def gone(self, shape: ModelShape) -> float:
        """Returns the ratio that the cuts to a shape have removed."""
        return 1 - shape.linear_numel() / self.dense.linear_numel()

    def chunks(self, layer: int, kind: Kind, count: int) -> list[int]:
        """Returns the groups of each chunk from `count` down to the floor."""
        multiple = self.multiples[kind]
        floor = self.floor[layer][kind]
        if count <= floor:
            return []
        first = count % multiple or multiple
        return [first] + [multiple] * ((count - first - floor) // multiple)

    def numel(self, layers: Sequence[LayerCounts]) -> dict[Kind, int]:
        """Counts the linear parameters of each kind in the open layers, from the counts of all layers."""
        open_layers = [layers[i] for i in self.open_layers]
        numel = self.dense.group_numel
        return {kind: numel[kind] * sum(x[kind] for x in open_layers) for kind in numel}

    @cached_property
    def removable(self) -> dict[Kind, int]:
        """The linear parameters of each kind above the floors."""
        floor = self.numel(self.floor)
        return {kind: numel - floor[kind] for kind, numel in self.numel(self.dense.counts).items()}

    def step_numel(self, kind: Kind) -> int:
        """Counts the linear parameters of one multiple of a kind: in one layer, or with `uniform` in all open ones."""
        group_numel = self.equal_numel if self.uniform else self.dense.group_numel
        return self.multiples[kind] * group_numel[kind]

    # Equal counts in all open layers, as config.json counts groups. A layer with twice as many loses twice as many.

    @cached_property
    def bounds(self) -> tuple[LayerCounts, LayerCounts]:
        """The fewest and the most groups that an open layer may have."""
        return self._equal_counts(self.floor), self._equal_counts(self.dense.counts)

    def _equal_counts(self, layers: Sequence[LayerCounts]) -> LayerCounts:
        """Returns the common counts, the largest because some layers lack a kind."""
        counts: dict[Kind, int] = dict.fromkeys(self.dense.kinds, 0)
        for i in self.open_layers:
            for kind in counts:
                count = layers[i][kind] // self.dense.times(i, kind)
                counts[kind] = max(counts[kind], count)
        return LayerCounts(counts)

    @cached_property
    def equal_numel(self) -> dict[Kind, int]:
        """The linear parameters of one group in every open layer that has such groups."""
        dense = self.dense
        numel = dict(dense.group_numel)
        for kind in numel:
            layers = (i for i in self.open_layers if dense.counts[i][kind])
            numel[kind] *= sum(dense.times(i, kind) for i in layers)
        return numel

    def narrowest(self) -> Iterator[LayerCounts]:
        """Yields for each count of heads the equal counts with the fewest channels (or experts)."""
        least, most = self.bounds
        as_many = self.dense.family.as_many
        *coarse, _ = self.dense.kinds
        coarse = [kind for kind in coarse if kind not in as_many]
        choices = [range(least[kind], most[kind] + 1, self.multiples[kind]) for kind in coarse]
        for chosen in product(*choices):
            counts = least | dict(zip(coarse, chosen, strict=True))
            for kind, twin in as_many.items():
                counts[kind] = min(counts[twin], most[kind])
            yield LayerCounts(counts)

    def with_equal(self, counts: Mapping[Kind, int]) -> ModelShape:
        """Returns the shape with equal counts in every open layer. Layers with delta nets and with attention differ."""
        layers = list(self.dense.counts)
        for i in self.open_layers:
            present = [kind for kind, count in layers[i].items() if count]
            equal = {kind: counts[kind] * self.dense.times(i, kind) for kind in present}
            layers[i] = LayerCounts(layers[i] | equal)
        return self.dense.resized(layers)


@dataclass(frozen=True)
class Budget:
    """Holds what a run or a cut removes."""

    ratio: float  # removed fraction of the dense linear parameters
    shares: Mapping[Kind, float]  # each kind's fraction of the removed parameters


def _open_layers(config: PruneConfig, dense: ModelShape) -> list[int]:
    """Lists the layers that are not protected. An encoder and its decoder protect their own."""
    open_layers = list[int]()
    for layers in dense.layer_lists:
        first = config.protected_first
        if first is None:
            first = math.ceil(len(layers) / 10)
        open_layers += layers[first : max(first, len(layers) - config.protected_last)]
    return open_layers


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits of a run. Raises UserError if settings conflict, or do not fit the model."""
    open_layers = _open_layers(config, dense)
    require(
        open_layers,
        f"prune.protected_first and prune.protected_last protect all {len(dense.layers)} layers",
    )
    _check_servers(config.tensor_parallel, dense)
    multiples = _multiples(config, dense)
    _check_widths(config, dense, open_layers, multiples)
    uniform = config.ranking == "uniform"
    limits = Limits(dense, _floor(dense, open_layers, multiples), open_layers, multiples, uniform)
    if uniform and limits.with_equal(limits.bounds[1]).counts != dense.counts:
        raise UserError(
            "prune.ranking: uniform needs equal layers, but the layers of this model differ; use global"
        )
    return limits


def _check_servers(servers: int, dense: ModelShape) -> None:
    """Raises UserError if the GPUs of a server cannot divide what the model has before any cut."""
    key = f"prune.tensor_parallel {servers} does not divide the"
    if dense.mixture and dense.mixture.expert_size % servers:
        raise UserError(f"{key} {dense.mixture.expert_size} channels of an expert")
    require(dense.has_heads_for(servers), f"{key} key-value heads")
    for i, layer in enumerate(dense.counts):
        for kind, count in layer.items():
            if kind != "experts":
                require(count % servers == 0, f"{key} {count} {kind} of layer {i}")


def _multiples(config: PruneConfig, dense: ModelShape) -> dict[Kind, int]:
    """Returns the divisor of the kept counts of each kind."""
    servers = config.tensor_parallel
    multiples: dict[Kind, int] = dict.fromkeys(("heads", "cross_heads", "delta"), servers)
    multiples["channels"] = math.lcm(config.channel_multiple, servers)
    multiples[QUERY_HEADS] = math.lcm(dense.ranges(QUERY_HEADS), servers)
    return {kind: multiples.get(kind, dense.ranges(kind)) for kind in dense.kinds}


def _check_widths(
    config: PruneConfig, dense: ModelShape, open_layers: list[int], multiples: dict[Kind, int]
) -> None:
    """Raises UserError if an open layer has fewer channels than one multiple."""
    multiple = multiples.get("channels", 0)
    key = f"prune.channel_multiple {config.channel_multiple}"
    if multiple > config.channel_multiple:
        key += f" with prune.tensor_parallel {config.tensor_parallel}"
    for i in open_layers:
        channels = dense.counts[i].get("channels", 0)
        require(
            channels == 0 or channels >= multiple,
            f"{key} needs at least {multiple} channels, and layer {i} has {channels}",
        )


def _floor(
    dense: ModelShape, open_layers: list[int], multiples: dict[Kind, int]
) -> tuple[LayerCounts, ...]:
    """Returns the fewest groups that each layer keeps: one multiple, or all that it has."""
    least = dict(multiples)
    if dense.mixture:
        least["experts"] *= math.ceil(dense.mixture.least_experts / least["experts"])
    floor = list(dense.counts)
    for i in open_layers:
        counts = dict(floor[i])
        for kind in counts.keys() - dense.family.fixed:
            counts[kind] = min(least[kind] * dense.times(i, kind), counts[kind])
        floor[i] = LayerCounts(counts)
    return tuple(floor)


def make_budget(config: PruneConfig, limits: Limits, ratio: float) -> Budget:
    """Divides a ratio among the kinds. Raises UserError if it conflicts with `prune.head_ratio`."""
    if config.head_ratio is None:
        return Budget(ratio, _shares_by_size(limits))
    return Budget(ratio, _shares_by_head_ratio(config.head_ratio, limits, ratio))


def _shares_by_size(limits: Limits) -> dict[Kind, float]:
    """Lets all kinds lose the same fraction of their parameters. Of a mixture only experts leave."""
    dense = limits.dense
    numel = limits.numel(dense.counts)
    if dense.mixture:  # such models have few heads, which stay
        numel |= dict.fromkeys(dense.kinds[:-1], 0)
    total = max(1, sum(numel.values()))
    return {kind: part / total for kind, part in numel.items()}


def _shares_by_head_ratio(head_ratio: float, limits: Limits, ratio: float) -> dict[Kind, float]:
    """Lets heads (and delta nets) lose this fraction of their parameters, and the finest kind the rest."""
    dense = limits.dense
    *coarse, fine = dense.kinds
    key = f"prune.head_ratio {head_ratio}"
    require(
        head_ratio == 0 or "heads" in coarse or QUERY_HEADS in coarse,
        f"{key}: a {dense.model_type} keeps its heads; remove the setting",
    )
    numel = limits.numel(dense.counts)
    heads = sum(numel[kind] for kind in coarse)
    removable_heads = sum(limits.removable[kind] for kind in coarse)
    leaving_heads = head_ratio * heads
    # Only whole heads leave.
    half_a_step = sum(limits.equal_numel[kind] * limits.multiples[kind] for kind in coarse) / 2
    if leaving_heads > removable_heads + half_a_step:
        raise UserError(f"{key}: at most {removable_heads / heads:.1%} of the heads may leave")
    leaving = max(1, limits.leaving(ratio))
    rest = leaving - leaving_heads
    removable = limits.removable[fine]
    if not 0 <= rest <= removable + half_a_step:
        total = max(1, numel[fine])
        raise UserError(
            f"{key} with prune.ratio {ratio} would remove {rest / total:.1%} of the {fine}, "
            f"but only {removable / total:.1%} may leave"
        )
    shares = {kind: head_ratio * numel[kind] / leaving for kind in coarse}
    return shares | {fine: 1 - leaving_heads / leaving}


def reachable(config: PruneConfig, limits: Limits) -> tuple[float, float]:
    """Returns the least and the most parameters that can leave, up to a fraction of a group."""
    *coarse, fine = limits.dense.kinds
    most = sum(limits.removable.values())
    if config.head_ratio is None:
        return 0, most
    numel = limits.numel(limits.dense.counts)
    leaving_heads = config.head_ratio * sum(numel[kind] for kind in coarse)
    return leaving_heads, min(most, leaving_heads + limits.removable[fine])


def check_reachable(config: PruneConfig, limits: Limits, ratio: float) -> None:
    """Raises UserError if the ratio is out of reach. The message names the largest ratio."""
    *coarse, fine = limits.dense.kinds
    _, most = reachable(config, limits)
    # The largest ratio may be missed: `global` by a group, `uniform` by half a multiple of channels per layer.
    tolerance = max(map(limits.step_numel, coarse), default=0)
    if limits.uniform:
        least, widest = limits.bounds
        channels = (widest[fine] - least[fine]) * limits.equal_numel[fine]
        tolerance = min(limits.step_numel(fine), channels) / 2
    if most == 0 or limits.leaving(ratio) > most + tolerance:
        largest = math.floor(1e4 * most / limits.dense.linear_numel()) / 1e4
        raise UserError(
            f"prune.ratio {ratio} is out of reach: with the protected layers and minimum widths "
            f"at most {largest} can leave"
        )


def shortfall(limits: Limits, asked: float, reached: float) -> str | None:
    """Says how far a run ends below the ratio that it was asked for. None within the largest step of its ranking."""
    largest_step = max(map(limits.step_numel, limits.dense.kinds))
    if (asked - reached) * limits.dense.linear_numel() <= largest_step:
        return None
    return (
        f"the run ends with {format_percent(reached)} of the linear parameters removed; "
        f"its last cut was to reach {format_percent(asked)}"
    )
