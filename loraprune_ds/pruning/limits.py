"""What pruning may take from which layer: protected layers, minimum widths, a cap per layer."""

import math
from dataclasses import dataclass

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.shapes import LayerShape, ModelShape


@dataclass(frozen=True)
class Limits:
    """What pruning may take from which layer, fixed at the start of a run.

    Attributes:
        dense: the shape before any cut.
        floor: fewest groups each layer keeps; a protected layer's floor is its dense count.
        layer_budget: most linear parameters each layer may lose.
        multiple: kept channel counts are multiples of this, except uncut ones.
    """

    dense: ModelShape
    floor: tuple[LayerShape, ...]
    layer_budget: tuple[int, ...]
    multiple: int

    @property
    def open_layers(self) -> list[int]:
        """Layers that pruning may cut."""
        return [i for i, budget in enumerate(self.layer_budget) if budget > 0]


def make_limits(config: PruneConfig, dense: ModelShape) -> Limits:
    """Protected layers, minimum widths and the cap per layer.

    Raises:
        UserError: everything is protected, `uniform` meets layers of different shapes, or `prune.ratio` is out of
            reach under these limits; the message states the largest ratio that is not.
    """
    count = len(dense.layers)
    first = max(1, math.ceil(0.1 * count)) if config.protected_first is None else config.protected_first
    protected = {i for i in range(count) if i < first or i >= count - config.protected_last}
    if len(protected) == count:
        raise UserError(f"prune.protected_first and prune.protected_last protect all {count} layers")
    floor, budget = [], []
    for i, layer in enumerate(dense.layers):
        least_channels = math.ceil(config.min_channels / config.channel_multiple) * config.channel_multiple
        cut = LayerShape(min(config.min_heads, layer.heads), min(least_channels, layer.channels))
        floor.append(layer if i in protected else cut)
        budget.append(0 if i in protected else int(config.max_layer_ratio * dense.layer_numel(i)))
    limits = Limits(dense, tuple(floor), tuple(budget), config.channel_multiple)
    _check_reachable(config, limits)
    return limits


def _check_reachable(config: PruneConfig, limits: Limits) -> None:
    dense = limits.dense
    if config.ranking == "uniform" and len({dense.layers[i] for i in limits.open_layers}) > 1:
        raise UserError("prune.ranking: uniform needs layers of equal shape, and this model's differ; use global")
    floors = dense.with_layers(limits.floor)
    most = sum(min(limits.layer_budget[i], dense.layer_numel(i) - floors.layer_numel(i)) for i in limits.open_layers)
    if config.ratio * dense.linear_numel() > most:
        raise UserError(
            f"prune.ratio {config.ratio} is out of reach: with the protected layers, minimum widths and "
            f"prune.max_layer_ratio at most {math.floor(1e4 * most / dense.linear_numel()) / 1e4} can go"
        )
