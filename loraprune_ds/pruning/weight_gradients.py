"""The true gradient of the frozen weights: whole for one linear at a time, then sharded like W itself.

Of a stack of experts it has a block for each expert, from the tokens that chose it. Nobody chose some: theirs is zero.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.experts import products
from loraprune_ds.model.family_row import Linear, LinearId
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.taps import OutputTap, StepRecorder


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
        x, *counts = inputs  # a stack has the tokens of each expert, too
        # The output of the whole LoRA layer has the gradient of W's part of it. Unlike that part it needs a gradient in
        # the first layer too, whose input needs none.
        receive = partial(self._receive, linear_id, *counts or [None])
        return cast(Tensor, OutputTap.apply(output, x, receive)) if self._active else None

    def _receive(self, linear_id: LinearId, counts: list[int] | None, gradient: Tensor, inputs: Tensor) -> None:
        if gradient.dtype == torch.float16:  # scaled for LoRA's gradients, which are smaller than W's
            gradient, inputs = gradient.float(), inputs.float()
        rows, columns = (x.flatten(0, -2) for x in (gradient, inputs))
        if linear_id.linear.transposed:
            rows, columns = columns, rows
        whole = products(rows, columns, counts or [len(rows)])  # in the shape of W
        self._add(linear_id, self._model.reduce_scatter(whole.reshape(-1)).float())
