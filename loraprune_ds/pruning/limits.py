"""`Limits`: what may leave at all, however much a run removes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.groups import QUERY_HEADS, Kind, LayerCounts
from loraprune_ds.model.shape import ModelShape


@dataclass(frozen=True)
class Limits:
    """Holds the limits on the counts of each layer."""

    dense: ModelShape
    # fewest groups that each layer keeps. A protected layer keeps all
    floor: tuple[LayerCounts, ...]
    open_layers: list[int]  # layers that are not protected
    # kept counts are multiples of these, unless they are dense counts
    multiples: Mapping[Kind, int]
    uniform: bool  # all open layers keep equal counts

    def gone(self, shape: ModelShape) -> float:
        """Returns the ratio that the cuts to a shape have removed."""
        return 1 - shape.linear_numel() / self.dense.linear_numel()

    def numel(self, layers: Sequence[Mapping[Kind, int]]) -> dict[Kind, int]:
        """Counts the linear parameters of each kind in the open layers, from the counts of all layers."""
        open_layers = [layers[i] for i in self.open_layers]
        numel = self.dense.group_numel
        return {kind: numel[kind] * sum(x[kind] for x in open_layers) for kind in numel}

    def gone_of(self, layers: Sequence[Mapping[Kind, int]]) -> dict[Kind, int]:
        """Counts the linear parameters of each kind that have left, from the counts of all layers."""
        left = self.numel(layers)
        return {kind: numel - left[kind] for kind, numel in self.dense_numel.items()}

    @cached_property
    def dense_numel(self) -> dict[Kind, int]:
        """The linear parameters of each kind in the open layers before any cut."""
        return self.numel(self.dense.counts)

    @cached_property
    def removable(self) -> dict[Kind, int]:
        """The linear parameters of each kind above the floors."""
        return self.gone_of(self.floor)

    def step_numel(self, kind: Kind) -> int:
        """Counts the linear parameters of one multiple of a kind: in one layer, or with `uniform` in all open ones."""
        group_numel = self.equal_numel if self.uniform else self.dense.group_numel
        return self.multiples[kind] * group_numel[kind]

    # Equal counts in all open layers, as config.json counts groups. A layer with twice as many loses twice as many.
    # Kinds that a stock class holds with one number (`Family.as_many`) have one count.

    @cached_property
    def least(self) -> LayerCounts:
        """The fewest groups that an open layer may have."""
        return self._equal_counts(self.floor)

    @cached_property
    def most(self) -> LayerCounts:
        """The groups of an open layer before any cut."""
        return self._equal_counts(self.dense.counts)

    def _equal_counts(self, layers: Sequence[LayerCounts]) -> LayerCounts:
        """Returns the common counts, the largest because some layers lack a kind."""
        dense = self.dense
        counts: dict[Kind, int] = {}
        for kind in dense.kinds:
            if kind not in dense.family.as_many:
                counts[kind] = max(
                    layers[i][kind] // dense.times(i, kind) for i in self.open_layers
                )
        return LayerCounts(counts)

    @cached_property
    def equal_numel(self) -> dict[Kind, int]:
        """The linear parameters of one group in every open layer that has such groups."""
        numel = dict.fromkeys(self.most, 0)
        for kind, of_kind in self.dense_numel.items():
            kind = self.dense.family.as_many.get(kind, kind)
            numel[kind] += of_kind // max(1, self.most[kind])
        return numel

    def nearest(self, kind: Kind, count: float) -> int:
        """Returns the multiple that is nearest to an equal count, or one of the bounds."""
        multiple = self.multiples[kind]
        below = math.floor(count / multiple) * multiple
        lower = max(below, self.least[kind])
        upper = min(below + multiple, self.most[kind])
        return lower if count - lower <= upper - count else upper

    def with_equal(self, counts: Mapping[Kind, int]) -> ModelShape:
        """Returns the shape with equal counts in every open layer. Layers with delta nets and with attention differ."""
        as_many = self.dense.family.as_many
        layers = list(self.dense.counts)
        for i in self.open_layers:
            present = [kind for kind, count in layers[i].items() if count]
            equal = {
                kind: counts[as_many.get(kind, kind)] * self.dense.times(i, kind)
                for kind in present
            }
            layers[i] = LayerCounts(layers[i] | equal)
        return self.dense.resized(layers)


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
    if uniform and limits.with_equal(limits.most).counts != dense.counts:
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
