"""The true gradient of the frozen weights, in pieces: whole for one linear at a time, then only where W itself lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.shapes import LINEARS, Linear
from loraprune_ds.zero.store import Site, WeightStore


class WeightGradients:
    """Collects the gradient of every frozen linear during one step: fp32, averaged over the global batch.

    In the backward pass of a linear its gradient gᵀ·x is formed in the model's dtype (fp16: in fp32), reduce-scattered
    in fp32 to the owners of W's flat pieces and added up there over the micro-batches. While a step lasts a rank holds
    those pieces, 4 bytes per element of W over W ranks, and one linear's gradient at a time: 4 bytes per element, and a
    copy in the model's dtype.
    """

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._pieces: dict[Site, Tensor] = {}
        self._active = False
        for i, layer in enumerate(store.layers):
            for linear in LINEARS:
                lora_linear(layer, linear).register_forward_hook(partial(self._tap, Site(i, linear)))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Around all forward and backward passes of a step, and the use of `owned`; nothing is kept afterwards."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._pieces.clear()

    def owned(self, layer: int, linear: Linear) -> Tensor:
        """The gradient of the elements that `WeightStore.owned_weight` returns: (elements,) fp32."""
        return self._pieces[Site(layer, linear)] / (self._store.world_size * self._store.loss_scale)

    def _tap(self, site: Site, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        # The output of the whole LoRA layer: its gradient is that of W's part of it, and unlike that part it needs a
        # gradient in the first layer too, whose input needs none.
        return _Tap.apply(output, inputs[0], partial(self._receive, site)) if self._active else None

    def _receive(self, site: Site, gradient: Tensor, inputs: Tensor) -> None:
        if gradient.dtype == torch.float16:  # scaled for LoRA's gradients, which are smaller than W's
            gradient, inputs = gradient.float(), inputs.float()
        whole = gradient.flatten(0, -2).T @ inputs.flatten(0, -2)  # (out_features, in_features)
        piece = self._store.reduce_scatter(whole.reshape(-1).float())
        if site in self._pieces:
            self._pieces[site].add_(piece)
        else:
            self._pieces[site] = piece


class _Tap(torch.autograd.Function):
    """The identity on a linear's output, which shows the linear's input and its output's gradient to a receiver.

    The input is saved as autograd saves tensors: activation checkpointing drops it and has it again when it is needed.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, receive: Any) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inputs,) = ctx.saved_tensors
        ctx.receive(gradient, inputs)
        return gradient, None, None
