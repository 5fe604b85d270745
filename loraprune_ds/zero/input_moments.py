"""First or second moments of what enters o_proj and down_proj, measured in the forward passes of training itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.shapes import INPUT_LINEARS
from loraprune_ds.zero.device import tf32_where_exact
from loraprune_ds.zero.store import LayerKeep, Site, WeightStore


class InputMoments:
    """Moving averages over steps, fp32: mean of x xᵀ (n, n), or with `second` off of x (n,), over the tokens of a step.

    Only of `layers`, as no other can be cut. What a layer's linears need is kept whole on the layer's owner and nowhere
    else. Every rank forms its part for one linear at a time, in the forward pass, and adds it up on the owner at once,
    so beside its own layers' moments a rank holds one matrix: with n = intermediate_size the memory is at most
    4·n²·(ceil(layers / W) + 1) bytes, and o_proj's beside.
    """

    def __init__(self, store: WeightStore, layers: Sequence[int], *, second: bool, decay: float) -> None:
        self.values: dict[Site, Tensor] = {}  # this rank's layers
        self._store = store
        self._second = second
        self._decay = decay
        self._weight = 0.0
        self._active = False
        self._real: Tensor | None = None
        for i in layers:
            for linear in INPUT_LINEARS:
                module = lora_linear(store.layers[i], linear)
                module.register_forward_pre_hook(partial(self._measure, Site(i, linear)))

    def begin(self, tokens: int) -> None:
        """A step of so many tokens in all its micro-batches and ranks will be measured."""
        self._weight = (1 - self._decay if self.values else 1.0) / tokens
        for value in self.values.values():
            value.mul_(self._decay)

    @contextmanager
    def measuring(self, real: Tensor | None) -> Iterator[None]:
        """Around the forward pass of one micro-batch, not around its backward, which may run the forward again.

        Args:
            real: (batch, window) bool, False at padding; None where there is none.
        """
        self._active, self._real = True, real
        try:
            yield
        finally:
            self._active, self._real = False, None

    def shrink(self, keep: list[LayerKeep]) -> None:
        """Cuts the moments along with the groups; the store must still have its shape from before the cut."""
        for site, value in self.values.items():
            kept = keep[site.layer]
            if not kept.cuts(self._store.shape.layers[site.layer], site.linear.kind):
                continue
            indices = kept.indices(self._store.shape, site.linear).to(value.device)
            value = value.index_select(0, indices)
            self.values[site] = value.index_select(1, indices) if self._second else value

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """The moments of one layer by linear; empty where this rank does not own it or nothing was measured."""
        return {site.linear.name: value for site, value in self.values.items() if site.layer == layer}

    def restore(self, read: Callable[[int], dict[str, Tensor]]) -> None:
        """Goes on where a checkpoint left off; `read` gives what `of_layer` gave on whichever rank owned the layer."""
        for layer in range(len(self._store.layers)):
            if self._store.owner(layer) == self._store.rank:
                found = read(layer)
                for linear in INPUT_LINEARS:
                    if linear.name in found:
                        self.values[Site(layer, linear)] = found[linear.name].to(self._store.device)

    def clear(self) -> None:
        self.values.clear()

    @torch.no_grad()
    def _measure(self, site: Site, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._active:
            return
        x: Tensor = inputs[0].detach()
        rows = (x.flatten(0, 1) if self._real is None else x[self._real.to(x.device)]).float()  # (tokens, n)
        with tf32_where_exact(x.dtype, x.device):
            part = rows.T @ rows if self._second else rows.sum(0)
        total = self._store.reduce_to(self._store.owner(site.layer), part)
        if total is None:
            return
        if site in self.values:
            self.values[site].add_(total, alpha=self._weight)
        else:
            self.values[site] = total.mul_(self._weight)
