"""A frozen linear whose weight is int8 with scales (frozen.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import DENSE, SCALE, WEIGHT, Form, Int8, dequantise
from loraprune_ds.model.shapes import ModelShape


class Int8Linear(nn.Linear):
    """Stands in for a linear: `weight` (out_features, in_features) int8, `weight_scale` in the dtype of the bias.

    PEFT wraps it like any linear, because it is one.
    """

    def __init__(self, linear: nn.Linear, form: Int8) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.form = linear.in_features, linear.out_features, form
        shape = (self.out_features, self.in_features)
        weight, scale = (
            linear.weight.new_empty(shape, dtype=torch.int8),
            linear.weight.new_empty(form.scale_shape(shape)),
        )
        self.register_parameter(WEIGHT, nn.Parameter(weight, requires_grad=False))
        self.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.weight, self.weight_scale, self.bias, self.form.axis)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    """Maps x to x·Wᵀ + b. W is made for the product alone, in the forward pass and again in the backward pass.

    autograd keeps the parameters, which ZeRO-3 frees and gathers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.axis = axis
        columns = dequantise(weight, scale, axis).t()
        if bias is None:
            return x.matmul(columns)
        return torch.addmm(bias, x, columns) if x.dim() == 2 else x.matmul(columns).add_(bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        return gradient.matmul(dequantise(weight, scale, ctx.axis)) if needed else None, None, None, None, None


def hold_frozen(model: nn.Module, shape: ModelShape) -> None:
    """Replaces the linears of all decoder layers that `shape` holds as int8. Their parameters have no values yet."""
    if not shape.int8:
        return
    for layer in decoder_layers(model):
        for linear in shape.linears:
            path, _, name = linear.name.rpartition(".")
            stock: Any = layer.get_submodule(linear.name)
            setattr(layer.get_submodule(path), name, Int8Linear(stock, Int8(linear.axis)))


def form_of(linear: nn.Module) -> Form:
    """Returns the form in which a live linear holds its weight."""
    return linear.form if isinstance(linear, Int8Linear) else DENSE
