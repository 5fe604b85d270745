"""Limits on what pruning may take from a layer: protected layers, minimum widths, a cap per layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.family import KINDS, Kind
from loraprune_ds.model.shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class Limits:
    """Tells what pruning may take from which layer. Fixed at the start of a run.

    Attributes:
        dense: the shape before any cut.
        floor: fewest groups that each layer keeps. A protected layer's floor is its dense count.
        layer_budget: most linear parameters each layer may lose.
        multiples: kept counts of a kind are multiples of this, except dense counts.
        head_share: the heads' part of the parameters that leave, where they do not compete with channels.
    """

    dense: ModelShape
    floor: tuple[LayerShape, ...]
    layer_budget: tuple[int, ...]
    multiples: Mapping[Kind, int]
    head_share: float

    @property
    def open_layers(self) -> list[int]:
        """The layers that pruning may cut."""
        return [i for i, budget in enumerate(self.layer_budget) if budget > 0]

    def blocks(self, layer: int, kind: Kind, count: int) -> list[int]:
        """Returns the sizes of the blocks that leave one after the other, from `count` groups down to the floor.

        A block has as many groups as lead to the next lower multiple.
        """
        multiple, floor = self.multiples[kind], self.floor[layer].count(kind)
        if count <= floor:
            return []
        first = count % multiple or multiple
        return [first] + [multiple] * ((count - first - floor) // multiple)

    def fewest_channels(self, layer: int, heads: int) -> int | None:
        """Returns the fewest channels that the layer may keep beside so many heads. None if the heads are too few."""
        dense = self.dense.layers[layer]
        spare = self.layer_budget[layer] - (dense.heads - heads) * self.dense.group_numel("heads")
        if spare < 0:
            return None
        least = dense.channels - spare // self.dense.group_numel("channels")
        least = _round_up(least, self.multiples["channels"])
        return min(max(least, self.floor[layer].channels), dense.channels)

    def lost(self, layer: int, heads: int, channels: int) -> int:
        """Returns the linear parameters that a layer of these counts has lost."""
        dense = self.dense.layers[layer]
        gone = (dense.heads - heads) * self.dense.group_numel("heads")
        return gone + (dense.channels - channels) * self.dense.group_numel("channels")


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Makes the limits of a run: protected layers, minimum widths and the cap per layer.

    Raises:
        UserError: everything is protected. Or `uniform` meets layers of different shapes. Or `prune.head_ratio` cannot
            go with `prune.ratio`. Or `prune.ratio` is out of reach. The message then states the largest that is not.
    """
    count = len(dense.layers)
    first = -(-count // 10) if config.protected_first is None else config.protected_first
    protected = {i for i in range(count) if i < first or i >= count - config.protected_last}
    if len(protected) == count:
        raise UserError(f"prune.protected_first and prune.protected_last protect all {count} layers")
    multiples = _multiples(config, dense, protected)
    least_heads = _round_up(config.min_heads, multiples["heads"])
    least_channels = _round_up(config.min_channels, multiples["channels"])
    floor: list[LayerShape] = []
    budget: list[int] = []
    for i, layer in enumerate(dense.layers):
        cut = LayerShape(min(least_heads, layer.heads), min(least_channels, layer.channels))
        floor.append(layer if i in protected else cut)
        # The sliver keeps 0.29 of 100 from being 28.999999999999996.
        budget.append(0 if i in protected else math.floor(config.max_layer_ratio * dense.layer_numel(i) + 1e-6))
    open_layers = [i for i, most in enumerate(budget) if most > 0]
    share = _head_share(config, dense, floor, open_layers, multiples["heads"])
    limits = Limits(dense, tuple(floor), tuple(budget), multiples, share)
    _check_reachable(config, limits)
    return limits


def _multiples(config: PruneConfig, dense: ModelShape, protected: set[int]) -> dict[Kind, int]:
    """Returns what the kept counts of each kind divide by.

    Raises:
        UserError: a layer has fewer channels than that. Or `prune.tensor_parallel` does not divide a dense count, which
            a protected layer keeps.
    """
    servers, multiple = config.tensor_parallel, math.lcm(config.channel_multiple, config.tensor_parallel)
    for i, layer in enumerate(dense.layers):
        for kind in KINDS:
            if layer.count(kind) % servers:
                raise UserError(
                    f"prune.tensor_parallel {servers} does not divide the {layer.count(kind)} {kind} of layer {i}"
                )
        if i not in protected and layer.channels < multiple:
            keys = f"prune.channel_multiple {config.channel_multiple}"
            keys += f" with prune.tensor_parallel {servers}" if multiple > config.channel_multiple else ""
            raise UserError(
                f"{keys} needs at least {multiple} channels, and layer {i} has {layer.channels}; choose a smaller one"
            )
    return {"heads": servers, "channels": multiple}


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _head_share(
    config: PruneConfig, dense: ModelShape, floor: list[LayerShape], open_layers: list[int], step: int
) -> float:
    """Returns the heads' part of the open layers' parameters or, with `prune.head_ratio`, of those that leave.

    Args:
        step: heads of a layer that leave together.

    Raises:
        UserError: so many heads may not leave. Or the channels would have to give less than nothing beside them, or
            more than may leave.
    """
    heads = sum(dense.layers[i].heads for i in open_layers) * dense.group_numel("heads")
    if config.head_ratio is None or not open_layers:
        return heads / max(1, sum(dense.layer_numel(i) for i in open_layers))
    channels = sum(dense.layers[i].channels for i in open_layers) * dense.group_numel("channels")
    leaving, of_heads = config.ratio * dense.linear_numel(), config.head_ratio * heads
    most = {kind: sum(dense.layers[i].count(kind) - floor[i].count(kind) for i in open_layers) for kind in KINDS}
    most_heads, most_channels = (most[kind] * dense.group_numel(kind) for kind in KINDS)
    half_a_step = len(open_layers) * step * dense.group_numel("heads") / 2  # per layer: as near as whole heads come
    if of_heads > most_heads + half_a_step:
        raise UserError(
            f"prune.head_ratio {config.head_ratio} is more of the heads than prune.min_heads {config.min_heads} lets "
            f"go: {most_heads / heads:.1%}"
        )
    if not of_heads <= leaving <= of_heads + most_channels + half_a_step:
        raise UserError(
            f"prune.head_ratio {config.head_ratio} with prune.ratio {config.ratio} would take "
            f"{(leaving - of_heads) / channels:.1%} of the channels, of which {most_channels / channels:.1%} may go"
        )
    return of_heads / leaving


def _check_reachable(config: PruneConfig, limits: Limits) -> None:
    dense = limits.dense
    if config.ranking == "uniform" and len({dense.layers[i] for i in limits.open_layers}) > 1:
        raise UserError("prune.ranking: uniform needs layers of equal shape, and this model's differ; use global")
    if not limits.open_layers:
        raise UserError(f"prune.max_layer_ratio {config.max_layer_ratio} lets nothing go")
    most = _most_uniform(limits) if config.ranking == "uniform" else _most_global(limits)
    # A ratio that equals a cap may miss it by a part of a group. Either ranking promises no more than that.
    a_step = limits.multiples["heads"] * dense.group_numel("heads")
    near = a_step if config.ranking == "global" else _half_a_step(limits)
    if most == 0 or config.ratio * dense.linear_numel() > most + near:
        raise UserError(
            f"prune.ratio {config.ratio} is out of reach: with the protected layers, minimum widths and "
            f"prune.max_layer_ratio at most {math.floor(1e4 * most / dense.linear_numel()) / 1e4} can go"
        )


def _half_a_step(limits: Limits) -> float:
    """Returns how far from a target `uniform` may end: half a channel (or multiple) in every layer.

    If a multiple is more than may go, no channel leaves, and that many fewer are the step.
    """
    first = limits.open_layers[0]
    step = min(limits.multiples["channels"], limits.dense.layers[first].channels - limits.floor[first].channels)
    return len(limits.open_layers) * step * limits.dense.group_numel("channels") / 2


def _most_uniform(limits: Limits) -> int:
    """Returns the largest loss of equal counts."""
    return len(limits.open_layers) * max(lost for lost, _ in _least_widths(limits, limits.open_layers[0]))


def _most_global(limits: Limits) -> int:
    """Returns the largest loss that `global` reaches with any scores.

    Under a cap a layer ends where neither a head nor a channel may go any more. There can be several such ends, and the
    scores decide between them. So each layer counts with its smallest.
    """
    return sum(min(lost for lost, is_end in _least_widths(limits, i) if is_end) for i in limits.open_layers)


def _least_widths(limits: Limits, layer: int) -> list[tuple[int, bool]]:
    """Lists for every count of heads the loss with the fewest channels, and if one more head may not go."""
    widths: list[tuple[int, bool]] = []
    step = limits.multiples["heads"]
    for heads in range(limits.floor[layer].heads, limits.dense.layers[layer].heads + 1, step):
        channels = limits.fewest_channels(layer, heads)
        if channels is not None:
            lost = limits.lost(layer, heads, channels)
            one_more = lost + step * limits.dense.group_numel("heads") <= limits.layer_budget[layer]
            widths.append((lost, heads == limits.floor[layer].heads or not one_more))
    return widths
