"""Records the inputs of linears and the gradients of masks, in the forward and backward passes of training."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.pruning.prunable_model import PrunableModel

CPU_INPUTS = 1 << 17  # elements of inputs at a time, so their fp32 copies and squares stay in a CPU's cache

# (linear, its input; for a stack also the tokens of each expert) -> a replacement for the input, or None to keep it.
SeeInput = Callable[..., Tensor | None]


def hook_inputs(model: PrunableModel, linears: Iterable[tuple[int, TensorSpec]], see: SeeInput) -> None:
    """Calls `see` in every forward pass with the input of each linear: (batch, window, in_features).

    The input of a stack of experts is (tokens, in_features), in the order of the experts.
    """

    def hook(linear_id: LinearId, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = see(linear_id, *inputs)
        return None if changed is None else (changed, *inputs[1:])

    for i, linear in linears:
        module = lora_linear(model.layers[i], linear.linear)
        module.register_forward_pre_hook(partial(hook, LinearId(i, linear.linear)))


class ForwardRecorder:
    """Records forward passes inside `record_forward`, without padded positions."""

    def __init__(self) -> None:
        self._active = False
        self._masks: tuple[Tensor | None, ...] = ()

    @contextmanager
    def record_forward(self, *masks: Tensor | None) -> Generator[None]:
        """Records one micro-batch. Close it before the backward pass, which may run the forward again."""
        self._active, self._masks = True, masks
        try:
            yield
        finally:
            self._active, self._masks = False, ()

    def _of_tokens(self, values: Tensor, layer_list: int = 0) -> Tensor:
        """Returns (tokens, ...) of the text in values, (batch, window, ...), of a layer in this layer list."""
        mask = self._masks[layer_list]
        return values.flatten(0, 1) if mask is None else values[mask.to(values.device)]


class StepRecorder:
    """Adds up a tensor per linear over the micro-batches of one step."""

    def __init__(self) -> None:
        self._recorded: dict[LinearId, Tensor] = {}
        self._active = False

    @contextmanager
    def record(self) -> Generator[None]:
        """Records while open, around all passes of a step and the use of the results. Keeps nothing afterwards."""
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
    """Returns its input. The backward pass calls a receiver with the gradient and with a saved tensor.

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


class MaskGradients(StepRecorder):
    """Records the importance of groups for the criterion `fisher`: the gradient of a mask on their inputs.

    Imagine a mask m_g = 1 on the inputs of o_proj or down_proj that belong to group g. Removing the group sets m_g to
    0. At token t the mask has the gradient

        s_tg = Σ_{j in g} x_tj · ∂L/∂x_tj

    The score is Σ_t s_tg², the diagonal of the mask's empirical Fisher information, up to a factor. It estimates the
    change of the loss (Kwon et al., arXiv 2204.00656, section 4; for heads Michel et al., arXiv 1905.10650), so layers,
    heads and channels compare without norms. LoRA's backward forms ∂L/∂x anyway; W and LoRA are not read. All inputs
    of an expert's last linear belong to the expert, so its mask is on its output, and t are its tokens.

    L is the mean loss over the global batch. Tokens are summed one by one, so the number of ranks and accumulation make
    no difference. A padded position adds nothing, because its gradient is zero.
    """

    def __init__(self, model: PrunableModel) -> None:
        super().__init__()
        self._model = model
        hook_inputs(model, self.linears, self._tap)

    @property
    def linears(self) -> list[tuple[int, TensorSpec]]:
        """The linears that are scored."""
        return self._model.shape.input_linears()

    def sums(self) -> list[Tensor]:
        """Returns this rank's part of Σ_t s_tg², (groups,) float64 for each linear that reads groups."""
        # ZeRO-3 averages over the ranks, so the loss was multiplied by their number. fp16 adds a factor.
        scale = self._model.world_size * self._model.loss_scale
        return [self._recorded[LinearId(i, linear.linear)] / scale**2 for i, linear in self.linears]

    def _tap(self, linear_id: LinearId, inputs: Tensor, counts: list[int] | None = None) -> Tensor | None:
        if not self._active:
            return None
        return cast(Tensor, Tap.apply(inputs, inputs, partial(self._receive, linear_id, counts)))

    def _receive(self, linear_id: LinearId, counts: list[int] | None, gradient: Tensor, inputs: Tensor) -> None:
        if counts is None:
            squares = squared_gradients(inputs, gradient, self._model.shape.linear(linear_id).group_width)
        else:
            of_experts = zip(inputs.split(counts), gradient.split(counts), strict=True)
            squares = torch.cat([squared_gradients(x, g, x.shape[1]) for x, g in of_experts])
        self._add(linear_id, squares.double())


def squared_gradients(inputs: Tensor, gradient: Tensor, width: int) -> Tensor:
    """Returns Σ_t s_tg², (groups,) fp32, from x and ∂L/∂x, (..., groups · width)."""
    inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)
    columns, block_numel = inputs.shape[1], CPU_INPUTS if inputs.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    tokens = min(len(inputs), max(1, block_numel // columns))
    squares = torch.zeros(tokens, columns // width, dtype=torch.float32, device=inputs.device)
    for x, g in zip(inputs.split(tokens), gradient.split(tokens), strict=True):
        product = x.float().mul_(g.float()) if x.dtype != torch.float32 else x * g
        if width > 1:
            product = product.unflatten(1, (-1, width)).sum(2)
        squares[: len(product)].addcmul_(product, product)
    return squares.sum(0)
