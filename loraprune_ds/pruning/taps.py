"""Records what passes through the linears of the decoder layers, in the passes of training itself."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.experts import products
from loraprune_ds.model.family_row import Linear
from loraprune_ds.pruning.prunable_model import LinearId, PrunableModel

# (linear, its input; for a stack also the tokens of each expert) -> a replacement for the input, or None to keep it.
SeeInput = Callable[..., Tensor | None]


def hook_inputs(model: PrunableModel, linear_ids: Sequence[LinearId], see: SeeInput) -> None:
    """Calls `see` in every forward pass with the input of each linear: (batch, window, in_features).

    The input of a stack of experts is (tokens, in_features), in the order of the experts.
    """

    def hook(linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = see(linear_id, *inputs)
        return None if changed is None else (changed, *inputs[1:])

    for linear_id in linear_ids:
        module = lora_linear(model.layers[linear_id.layer], linear_id.linear)
        module.register_forward_pre_hook(partial(hook, linear_id))


class StepRecorder:
    """Adds up a tensor per linear over the micro-batches of one step."""

    def __init__(self) -> None:
        self._recorded: dict[LinearId, Tensor] = {}
        self._active = False

    @contextmanager
    def record(self) -> Generator[None]:
        """Records while open: around all passes of a step and the use of its results. Nothing is kept afterwards."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._recorded.clear()

    def _add(self, linear_id: LinearId, values: Tensor) -> None:
        """Adds the values of one micro-batch, and may overwrite them later."""
        if linear_id in self._recorded:
            self._recorded[linear_id].add_(values)
        else:
            self._recorded[linear_id] = values


class Tap(torch.autograd.Function):
    """Passes a tensor on. Its backward calls a receiver with the tensor's gradient and with a saved tensor.

    With activation checkpointing the forward runs twice and the backward once, so the receiver is called once.
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
    """Passes on an output that the model may change in place: OLMo clamps queries, keys and values this way."""

    @staticmethod
    def forward(ctx: Any, passed: Tensor, saved: Tensor, receive: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.receive = receive
        ctx.mark_dirty(passed)  # so autograd does not take it for a view
        return passed


class WeightGradients(StepRecorder):
    """Records the true gradient of every frozen linear during one step: fp32, averaged over the global batch.

    The backward of a linear forms gᵀ·x in the model's dtype (fp32 for fp16) and reduce-scatters it in that dtype, as
    DeepSpeed does by default. In bf16 this rounds once per rank. Shards are added up in fp32: during a step a rank
    holds 4 bytes for each element that it owns, one linear's full gradient, and its padded copy. A stack has a
    gradient for each expert, from the tokens that chose it.
    """

    def __init__(self, model: PrunableModel) -> None:
        super().__init__()
        self._model = model
        for linear_id in model.shape.linear_ids():
            module = lora_linear(model.layers[linear_id.layer], linear_id.linear)
            module.register_forward_hook(partial(self._tap, linear_id))

    def owned(self, layer: int, linear: Linear) -> Tensor:
        """Returns the gradient of the elements of `PrunableModel.owned_weight`: (elements,) fp32."""
        return self._recorded[LinearId(layer, linear)] / (self._model.world_size * self._model.loss_scale)

    def _tap(self, linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, *counts = inputs
        # The output of the LoRA layer has the same gradient as the part from W. Unlike that part it needs a
        # gradient in the first layer too.
        receive = partial(self._receive, linear_id, *counts or [None])
        return cast(Tensor, OutputTap.apply(output, x, receive)) if self._active else None

    def _receive(self, linear_id: LinearId, counts: list[int] | None, gradient: Tensor, inputs: Tensor) -> None:
        if gradient.dtype == torch.float16:  # scaled for LoRA's gradients, which are smaller than W's
            gradient, inputs = gradient.float(), inputs.float()
        rows, columns = (x.flatten(0, -2) for x in (gradient, inputs))
        if linear_id.linear.transposed:
            rows, columns = columns, rows
        full = products(rows, columns, counts or [len(rows)])  # in the shape of W
        self._add(linear_id, self._model.reduce_scatter(full.reshape(-1)).float())
