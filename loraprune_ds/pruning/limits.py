"""Limits on what pruning may take from a layer: protected layers, minimum widths, a cap per layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.family_row import Kind
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape


@dataclass(frozen=True)
class Limits:
    """Tells what pruning may take from which layer. Fixed at the start of a run.

    Attributes:
        dense: the shape before any cut.
        floor: fewest groups that each layer keeps. A protected layer's floor is its dense count.
        layer_budget: most linear parameters each layer may lose.
        multiples: kept counts of a kind are multiples of this, except dense counts.
        shares: each kind's part of the parameters that leave, where the kinds do not compete.
        ratio: fraction of the dense linear parameters that is gone at the end.
    """

    dense: ModelShape
    floor: tuple[LayerShape, ...]
    layer_budget: tuple[int, ...]
    multiples: Mapping[Kind, int]
    shares: Mapping[Kind, float]
    ratio: float

    @property
    def open_layers(self) -> list[int]:
        """The layers that pruning may cut."""
        return [i for i, budget in enumerate(self.layer_budget) if budget > 0]

    def blocks(self, layer: int, kind: Kind, count: int) -> list[int]:
        """Returns the sizes of the blocks that leave one after the other, from `count` groups down to the floor.

        A block has as many groups as lead to the next lower multiple.
        """
        multiple, floor = self.multiples[kind], self.floor[layer][kind]
        if count <= floor:
            return []
        first = count % multiple or multiple
        return [first] + [multiple] * ((count - first - floor) // multiple)

    def narrowest(self, layer: int) -> Iterator[LayerShape]:
        """Yields the narrowest shapes of a layer: the fewest groups of the finest kind beside each count of the others.

        What exceeds the layer's budget without any group of the finest kind is left out.
        """
        dense, floor = self.dense.layers[layer], self.floor[layer]
        *coarse, fine = self.dense.kinds
        for counts in product(*(range(floor[kind], dense[kind] + 1, self.multiples[kind]) for kind in coarse)):
            shape = LayerShape({**dense, **dict(zip(coarse, counts, strict=True))})
            spare = self.layer_budget[layer] - self.lost(layer, shape)
            if spare >= 0:
                least = _round_up(dense[fine] - spare // self.dense.group_numel(fine), self.multiples[fine])
                yield LayerShape({**shape, fine: min(max(least, floor[fine]), dense[fine])})

    def step_numel(self, kind: Kind) -> int:
        """Counts the linear parameters of the fewest groups of a kind that leave together."""
        return self.multiples[kind] * self.dense.group_numel(kind)

    def lost(self, layer: int, counts: Mapping[Kind, int]) -> int:
        """Returns the linear parameters that a layer of these counts has lost."""
        return self.dense.numel_of(self.dense.layers[layer]) - self.dense.numel_of(counts)


def make_limits(config: PruneConfig, dense: ModelShape, ratio: float | None = None) -> Limits:
    """Makes the limits of a run: protected layers, minimum widths and the cap per layer.

    Args:
        ratio: of a config with `prune.target`, from `target.find_ratio`. None: `prune.ratio`.

    Raises:
        UserError: everything is protected. Or `uniform` meets layers of different shapes. Or `prune.head_ratio` cannot
            go with `prune.ratio`. Or `prune.ratio` is out of reach. The message then states the largest that is not.
    """
    ratio = config.ratio if ratio is None else ratio
    assert ratio is not None
    limits = with_ratio(config, limits_without_ratio(config, dense), ratio)
    _check_reachable(config, limits)
    return limits


def with_ratio(config: PruneConfig, limits: Limits, ratio: float) -> Limits:
    """Puts a ratio into limits, and the shares that follow from it.

    Raises:
        UserError: `prune.head_ratio` cannot go with it.
    """
    limits = replace(limits, ratio=ratio)
    if config.head_ratio is None:
        return limits
    return replace(limits, shares=_shares(config.head_ratio, limits))


def limits_without_ratio(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes what limits are without a ratio. The kinds share alike.

    Raises:
        UserError: as `make_limits`, where a ratio does not matter.
    """
    count = len(dense.layers)
    first = -(-count // 10) if config.protected_first is None else config.protected_first
    protected = {i for i in range(count) if i < first or i >= count - config.protected_last}
    if config.ranking == "uniform":  # a dense layer among sparse ones has no experts to give
        protected |= {i for i, layer in enumerate(dense.layers) if not all(layer.values())}
    if len(protected) == count:
        raise UserError(f"prune.protected_first and prune.protected_last protect all {count} layers")
    multiples = _multiples(config, dense, protected)
    least = {"experts": max(1, dense.least_experts)}
    floor: list[LayerShape] = []
    budget: list[int] = []
    for i, layer in enumerate(dense.layers):
        cut = LayerShape(
            (kind, count if kind in dense.family.fixed else min(_round_up(least.get(kind, 1), multiples[kind]), count))
            for kind, count in layer.items()
        )
        floor.append(layer if i in protected else cut)
        # The sliver keeps 0.29 of 100 from being 28.999999999999996.
        budget.append(0 if i in protected else math.floor(config.max_layer_ratio * dense.layer_numel(i) + 1e-6))
    limits = Limits(dense, tuple(floor), tuple(budget), multiples, shares={}, ratio=0.0)
    if not limits.open_layers:
        raise UserError(f"prune.max_layer_ratio {config.max_layer_ratio} lets nothing go")
    if config.ranking == "uniform" and len({dense.layers[i] for i in limits.open_layers}) > 1:
        raise UserError("prune.ranking: uniform needs layers of equal shape, and this model's differ; use global")
    numel = {kind: _open_numel(limits, dense.layers, kind) for kind in dense.kinds}
    if dense.family.mixture:  # heads are few there, and stay
        numel["heads"] = 0
    return replace(limits, shares={kind: part / max(1, sum(numel.values())) for kind, part in numel.items()})


def _multiples(config: PruneConfig, dense: ModelShape, protected: set[int]) -> dict[Kind, int]:
    """Returns what the kept counts of each kind divide by.

    Raises:
        UserError: a layer has fewer channels than that. Or `prune.tensor_parallel` does not divide a dense count, which
            a protected layer keeps.
    """
    servers, multiple = config.tensor_parallel, math.lcm(config.channel_multiple, config.tensor_parallel)
    if dense.expert_size % servers:
        raise UserError(
            f"prune.tensor_parallel {servers} does not divide the {dense.expert_size} channels of an expert"
        )
    for i, layer in enumerate(dense.layers):
        for kind, count in layer.items():
            if kind != "experts" and count % servers:
                raise UserError(f"prune.tensor_parallel {servers} does not divide the {count} {kind} of layer {i}")
        if i not in protected and layer.get("channels", multiple) < multiple:
            keys = f"prune.channel_multiple {config.channel_multiple}"
            keys += f" with prune.tensor_parallel {servers}" if multiple > config.channel_multiple else ""
            has = f"layer {i} has {layer['channels']}"
            raise UserError(f"{keys} needs at least {multiple} channels, and {has}; choose a smaller one")
    multiples = {"heads": servers, "channels": multiple}
    return {kind: multiples.get(kind, dense.parts_of(kind)) for kind in dense.kinds}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _open_numel(limits: Limits, layers: Sequence[LayerShape], kind: Kind | None = None) -> int:
    """Counts the parameters of a kind, or all, in the open layers."""
    dense, of_open = limits.dense, [layers[i] for i in limits.open_layers]
    if kind is None:
        return sum(map(dense.numel_of, of_open))
    return sum(layer[kind] for layer in of_open) * dense.group_numel(kind)


def _shares(head_ratio: float, limits: Limits) -> dict[Kind, float]:
    """Returns each kind's part of the parameters that leave, with `prune.head_ratio`.

    Raises:
        UserError: so many heads may not leave. Or the channels would have to give less than nothing beside them, or
            more than may leave.
    """
    dense, heads = limits.dense, _open_numel(limits, limits.dense.layers, "heads")
    channels = _open_numel(limits, dense.layers) - heads
    most_heads, most_channels = _most_heads_and_channels(limits)
    rest = " and ".join(kind for kind in dense.kinds if kind != "heads")
    leaving, of_heads = limits.ratio * dense.linear_numel(), head_ratio * heads
    half_a_step = len(limits.open_layers) * limits.step_numel("heads") / 2  # per layer: as near as whole heads come
    if of_heads > most_heads + half_a_step:
        raise UserError(f"prune.head_ratio {head_ratio} is more of the heads than may go: {most_heads / heads:.1%}")
    if not of_heads <= leaving <= of_heads + most_channels + half_a_step:
        raise UserError(
            f"prune.head_ratio {head_ratio} with prune.ratio {limits.ratio} would take "
            f"{(leaving - of_heads) / channels:.1%} of the {rest}, of which {most_channels / channels:.1%} may go"
        )
    share = of_heads / leaving
    return {"heads": share, dense.kinds[-1]: 1 - share}


def _most_heads_and_channels(limits: Limits) -> tuple[int, int]:
    """Counts the parameters of the open layers' heads, and of the rest, that the floors let go."""
    dense, floor = limits.dense.layers, limits.floor
    heads = _open_numel(limits, dense, "heads") - _open_numel(limits, floor, "heads")
    return heads, _open_numel(limits, dense) - _open_numel(limits, floor) - heads


def reachable(config: PruneConfig, limits: Limits) -> tuple[float, float]:
    """Returns the least and the most parameters that can go, up to a part of a group."""
    most = _most_uniform(limits) if config.ranking == "uniform" else _most_global(limits)
    if config.head_ratio is None:
        return 0, most
    of_heads = config.head_ratio * _open_numel(limits, limits.dense.layers, "heads")
    return of_heads, min(most, of_heads + _most_heads_and_channels(limits)[1])


def _check_reachable(config: PruneConfig, limits: Limits) -> None:
    dense = limits.dense
    _, most = reachable(config, limits)
    # A ratio that equals a cap may miss it by a part of a group. Either ranking promises no more than that.
    a_step = max(limits.step_numel(kind) for kind in dense.kinds[:-1])
    near = a_step if config.ranking == "global" else _half_a_step(limits)
    if most == 0 or limits.ratio * dense.linear_numel() > most + near:
        raise UserError(
            f"prune.ratio {limits.ratio} is out of reach: with the protected layers, minimum widths and "
            f"prune.max_layer_ratio at most {math.floor(1e4 * most / dense.linear_numel()) / 1e4} can go"
        )


def _half_a_step(limits: Limits) -> float:
    """Returns how far from a target `uniform` may end: half a channel (or multiple) in every layer.

    If a multiple is more than may go, no channel leaves, and that many fewer are the step.
    """
    first, fine = limits.open_layers[0], limits.dense.kinds[-1]
    step = min(limits.multiples[fine], limits.dense.layers[first][fine] - limits.floor[first][fine])
    return len(limits.open_layers) * step * limits.dense.group_numel(fine) / 2


def _most_uniform(limits: Limits) -> int:
    """Returns the largest loss of equal counts."""
    first = limits.open_layers[0]
    return len(limits.open_layers) * max(limits.lost(first, shape) for shape in limits.narrowest(first))


def _most_global(limits: Limits) -> int:
    """Returns the largest loss that `global` reaches with any scores.

    Under a cap a layer ends where no group may go any more. There can be several such ends, and the scores decide
    between them. So each layer counts with its smallest.
    """
    return sum(min(_ends(limits, i)) for i in limits.open_layers)


def _ends(limits: Limits, layer: int) -> Iterator[int]:
    """Yields the losses at which a layer has no group left that may go."""
    floor, coarse = limits.floor[layer], limits.dense.kinds[:-1]
    for shape in limits.narrowest(layer):
        lost = limits.lost(layer, shape)
        spare = limits.layer_budget[layer] - lost
        if all(shape[kind] == floor[kind] or limits.step_numel(kind) > spare for kind in coarse):
            yield lost
