"""Shows what passes through the linears of the decoder layers, in training's own passes."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.pruning.prunable_model import LinearId, PrunableModel

# (linear, its input; of a stack also the tokens of each expert) -> what the linear computes with instead. None leaves
# the input as it is.
SeeInput = Callable[..., Tensor | None]


def hook_inputs(model: PrunableModel, linear_ids: Sequence[LinearId], see: SeeInput) -> None:
    """Hooks what enters some linears.

    Args:
        see: is called in every forward pass, with an input (batch, window, in_features). That of a stack of experts is
            (tokens, in_features), in the order of the experts.
    """

    def hook(linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = see(linear_id, *inputs)
        return None if changed is None else (changed, *inputs[1:])

    for linear_id in linear_ids:
        module = lora_linear(model.layers[linear_id.layer], linear_id.linear)
        module.register_forward_pre_hook(partial(hook, linear_id))


class StepRecorder:
    """Records what a step's passes show of each linear, added up over the micro-batches."""

    def __init__(self) -> None:
        self._recorded: dict[LinearId, Tensor] = {}
        self._active = False

    @contextmanager
    def record(self) -> Generator[None]:
        """Records while it is open: around all passes of a step and the use of its results. Keeps nothing after."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._recorded.clear()

    def _add(self, linear_id: LinearId, values: Tensor) -> None:
        """Adds the values of one micro-batch. They are the recorder's from now on."""
        if linear_id in self._recorded:
            self._recorded[linear_id].add_(values)
        else:
            self._recorded[linear_id] = values


class Tap(torch.autograd.Function):
    """Passes a tensor on. In the backward pass it shows the tensor's gradient and a saved tensor to a receiver.

    The saved tensor is kept as autograd keeps tensors. Activation checkpointing drops it and has it again when it is
    needed. A forward pass that only recomputes has no backward pass of its own. So the receiver is called once.
    """

    @staticmethod
    def forward(ctx: Any, passed: Tensor, saved: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.receive = receive
        return passed.view_as(passed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ctx.receive(gradient, saved)
        return gradient, None, None


class OutputTap(Tap):
    """Passes on an output that may be changed in place after it. Classes of OLMo clamp queries, keys and values so."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, saved: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.receive = receive
        ctx.mark_dirty(passed)  # so autograd does not take it for a view
        return passed
