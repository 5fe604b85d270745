"""A frozen linear whose weight is int8 with scales (frozen.py)."""

from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import DENSE, SCALE, WEIGHT, Form, Int8, dequantise
from loraprune_ds.model.shapes import ModelShape


class Int8Linear(nn.Linear):
    """Stands in for a linear: `weight` (out_features, in_features) int8, `weight_scale` in the dtype of the bias.

    PEFT wraps it like any linear, because it is one. A training pass goes through lora_product.py instead.
    """

    weight_scale: nn.Parameter

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
        return nn.functional.linear(input, dequantise(self.weight, self.weight_scale, self.form.axis), self.bias)


def hold_frozen(model: nn.Module, shape: ModelShape) -> None:
    """Replaces the linears of all decoder layers that `shape` holds as int8. Their parameters have no values yet."""
    if not shape.int8:
        return
    layers = decoder_layers(model)
    for i, linear in shape.linear_ids():
        path, _, name = linear.name.rpartition(".")
        stock: Any = layers[i].get_submodule(linear.name)
        setattr(layers[i].get_submodule(path), name, Int8Linear(stock, Int8(linear.axis)))


def form_of(linear: nn.Module) -> Form:
    """Returns the form in which a live linear holds its weight."""
    return linear.form if isinstance(linear, Int8Linear) else DENSE
