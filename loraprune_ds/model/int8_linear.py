"""Frozen linears whose weight may be int8 with scales (frozen.py)."""

import torch
from torch import Tensor, nn

from loraprune_ds.model.frozen import DENSE, SCALE, WEIGHT, Form, Int8, join


class HeldLinear(nn.Linear):
    """Knows the form in which it holds its frozen weight.

    PEFT wraps it like any linear, because it is one.
    """

    form: Form = DENSE

    def hold(self, form: Int8, like: Tensor) -> None:
        """Takes the parameters of a form in place of the weight. They have no values yet.

        Args:
            like: a tensor of the model's dtype, on the device.
        """
        shape = (self.out_features, self.in_features)
        weight, scale = like.new_empty(shape, dtype=torch.int8), like.new_empty(form.scale_shape(shape))
        self.register_parameter(WEIGHT, nn.Parameter(weight, requires_grad=False))
        self.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        self.form = form


class Int8Linear(HeldLinear):
    """Stands in for a linear: `weight` (out_features, in_features) int8, `weight_scale` in the dtype of the bias.

    A training pass goes through lora_product.py instead.
    """

    weight_scale: nn.Parameter

    def __init__(self, linear: nn.Linear, form: Int8) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.hold(form, linear.weight)
        self.register_parameter("bias", linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, join(self.form, held_tensors(self)), self.bias)


def form_of(linear: nn.Module) -> Form:
    """Returns the form in which a live linear holds its weight."""
    return linear.form if isinstance(linear, HeldLinear) else DENSE


def held_tensors(linear: nn.Module) -> list[Tensor]:
    """Returns the tensors that hold its weight, in the order of `Form.tensors`."""
    return [getattr(linear, name) for name in form_of(linear).tensors]
