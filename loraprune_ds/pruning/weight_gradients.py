"""The true gradient of the frozen weights: whole for one linear at a time, then sharded like W itself."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.family_row import Linear, LinearId
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.taps import StepRecorder, Tap


class WeightGradients(StepRecorder):
    """Records the gradient of every frozen linear during one step: fp32, averaged over the global batch.

    The backward pass of a linear forms its gradient gᵀ·x in the model's dtype (fp16: in fp32). In that dtype it is
    reduce-scattered to the ranks that own W's shards, as DeepSpeed does by default. In bf16 that rounds a sum once per
    rank. The shards are added up over the micro-batches in fp32. While a step lasts a rank holds 4 bytes per element of
    them. Beside them it holds one linear's gradient at a time, and its padded form.
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
        # The output of the whole LoRA layer has the gradient of W's part of it. Unlike that part it needs a gradient in
        # the first layer too, whose input needs none.
        return cast(Tensor, Tap.apply(output, inputs[0], partial(self._receive, linear_id))) if self._active else None

    def _receive(self, linear_id: LinearId, gradient: Tensor, inputs: Tensor) -> None:
        if gradient.dtype == torch.float16:  # scaled for LoRA's gradients, which are smaller than W's
            gradient, inputs = gradient.float(), inputs.float()
        whole = gradient.flatten(0, -2).T @ inputs.flatten(0, -2)  # (out_features, in_features)
        self._add(linear_id, self._model.reduce_scatter(whole.reshape(-1)).float())
