"""Builds the modules of a model on disk, without weights, for losses per token."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.model.classes import (
    attn_implementation,
    refused_in_one_line,
    shrink_on_meta,
    store_linears,
)
from loraprune_ds.model.token_loss import with_token_losses
from loraprune_ds.pretrained.pretrained import PretrainedModel


def build_for_losses(
    pretrained: PretrainedModel, attention: str, *, head: bool = True
) -> PreTrainedModel:
    """Copies the modules of a pretrained model without weights, in the sizes of its shape, with token losses.

    Without `head` it returns `final_hidden`.

    Raises:
        UserError: transformers refuses config.json or `model.attn_implementation`, or the head has a bias.
    """
    shape = pretrained.shape
    model = copy.deepcopy(pretrained.modules)
    with refused_in_one_line(f"{pretrained.folder}, model.attn_implementation {attention}"):
        model.set_attn_implementation(attn_implementation(attention, shape.family))
        model = with_token_losses(model)
    shrink_on_meta(model, shape)
    store_linears(model, shape, pretrained.weights.formats)
    if not head:
        model.register_module("lm_head", None)
    return model


def replace_parameters(
    model: nn.Module, make: Callable[[str, Tensor], nn.Parameter], device: torch.device
) -> None:
    """Replaces every parameter by the result of `make` for its name, a tied one only once, and moves buffers."""
    new: dict[Tensor, nn.Parameter] = {}
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in new:
            new[parameter] = make(path, parameter)
        module_name, _, name = path.rpartition(".")
        model.get_submodule(module_name)._parameters[name] = new[parameter]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
