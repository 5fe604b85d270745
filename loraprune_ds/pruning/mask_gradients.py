"""The criterion `fisher`: the importance of a group from the gradient of a mask on its inputs.

Imagine a mask m_g = 1 on the inputs of o_proj or down_proj that belong to group g. Removing the group sets m_g to 0.
At token t the mask has the gradient

    s_tg = Σ_{j in g} x_tj · ∂L/∂x_tj

The score is Σ_t s_tg², the diagonal of the mask's empirical Fisher information, up to a factor. It estimates the change
of the loss (Kwon et al., arXiv 2204.00656, section 4; for heads Michel et al., arXiv 1905.10650), so layers, heads and
channels compare without norms. LoRA's backward forms ∂L/∂x anyway; W and LoRA are not read.

All inputs of an expert's last linear belong to the expert, so its mask is on its output, and t are its tokens.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from functools import partial
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.pruning.importance import GroupSums, add_over_ranks
from loraprune_ds.pruning.prunable_model import LinearId, PrunableModel
from loraprune_ds.pruning.taps import StepRecorder, Tap, hook_inputs

CPU_BLOCK_NUMEL = 1 << 17  # inputs at a time: their fp32 copies and squares stay in a CPU's cache


class MaskGradients(StepRecorder):
    """Records the squared gradient of every group's mask during one step, summed over this rank's tokens.

    L is the mean loss over the global batch. Tokens are summed one by one, so the number of ranks and accumulation make
    no difference. A padded position adds nothing, because its gradient is zero.
    """

    def __init__(self, model: PrunableModel) -> None:
        super().__init__()
        self._model = model
        self._linear_ids = model.shape.input_linear_ids()
        hook_inputs(model, self._linear_ids, self._tap)

    def scores(self, step: int) -> GroupSums:
        """Returns the sums over all ranks, by one all-reduce."""
        return add_over_ranks(self._model, self._linear_ids, self.sums(), step)

    def sums(self) -> list[Tensor]:
        """Returns this rank's part of Σ_t s_tg², (groups,) float64 for each linear that reads groups."""
        # ZeRO-3 averages over the ranks, so the loss was multiplied by their number. fp16 adds a factor.
        scale = self._model.world_size * self._model.loss_scale
        return [self._recorded[linear_id] / scale**2 for linear_id in self._linear_ids]

    def _tap(self, linear_id: LinearId, inputs: Tensor, counts: list[int] | None = None) -> Tensor | None:
        if not self._active:
            return None
        return cast(Tensor, Tap.apply(inputs, inputs, partial(self._receive, linear_id, counts)))

    def _receive(self, linear_id: LinearId, counts: list[int] | None, gradient: Tensor, inputs: Tensor) -> None:
        if counts is None:
            squares = squared_gradients(inputs, gradient, self._model.shape.group_width(linear_id.linear))
        else:
            of_experts = zip(inputs.split(counts), gradient.split(counts), strict=True)
            squares = torch.cat([squared_gradients(x, g, x.shape[1]) for x, g in of_experts])
        self._add(linear_id, squares.double())


def squared_gradients(inputs: Tensor, gradient: Tensor, width: int) -> Tensor:
    """Returns Σ_t s_tg², (groups,) fp32, from x and ∂L/∂x, (..., groups · width)."""
    inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)
    columns, block_numel = inputs.shape[1], CPU_BLOCK_NUMEL if inputs.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    tokens = min(len(inputs), max(1, block_numel // columns))
    squares = torch.zeros(tokens, columns // width, dtype=torch.float32, device=inputs.device)
    for x, g in zip(inputs.split(tokens), gradient.split(tokens), strict=True):
        product = x.float().mul_(g.float()) if x.dtype != torch.float32 else x * g
        if width > 1:
            product = product.unflatten(1, (-1, width)).sum(2)
        squares[: len(product)].addcmul_(product, product)
    return squares.sum(0)
