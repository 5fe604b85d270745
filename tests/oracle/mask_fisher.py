"""Computes the criterion `fisher` from its definition: a mask that a dense model really multiplies its inputs by.

Shares no code with the package. Source: Kwon et al., arXiv 2204.00656, the diagonal of the Fisher information of masks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def mask_fisher(loss: Callable[[], Tensor], masked: Sequence[tuple[nn.Module, int]]) -> list[Tensor]:
    """Returns Σ over tokens of (∂loss/∂mask)², (groups,) float64 of each masked module, by one mask per token.

    Args:
        loss: makes one forward pass of the whole batch, which calls the masked modules in the order given.
        masked: modules, and the groups that their inputs consist of.
    """
    masks: list[Tensor] = []

    def multiply(groups: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        samples, tokens, width = inputs[0].shape
        masks.append(torch.ones(samples, tokens, groups, dtype=inputs[0].dtype, requires_grad=True))
        return inputs[0] * masks[-1].repeat_interleave(width // groups, 2), *inputs[1:]

    handles = [module.register_forward_pre_hook(partial(multiply, groups)) for module, groups in masked]
    gradients = torch.autograd.grad(loss(), masks)
    for handle in handles:
        handle.remove()
    return [gradient.double().square().sum((0, 1)) for gradient in gradients]
