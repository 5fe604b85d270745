"""The full LoRA factors of a model whose ranks hold parts of them."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from loraprune_ds.pruning.prunable_model import LoraFactors, PrunableModel
from loraprune_ds.ranks.flat import GATHERED_NUMEL, gather_rounds

# (flat parts of this rank, their parameters) -> full tensors. Collective
Gather = Callable[[list[Tensor], list[nn.Parameter]], list[Tensor]]


@torch.no_grad()
def gather_factors(model: PrunableModel, gather: Gather) -> Iterator[dict[str, LoraFactors]]:
    """Gathers masters and averaged gradients of A and B on every rank, several layers at once.

    fp16 gradients are unscaled here.
    """
    state = model.optimizer_state
    lora = [list(layer.values()) for layer in model.lora_parameters()]
    sizes: list[int] = []
    for layer in lora:
        numel = sum(math.prod(state.full_shape(parameter)) for parameter in layer)
        sizes.append(2 * numel)  # with the gradients
    for layers in gather_rounds(sizes, GATHERED_NUMEL):
        parameters = [parameter for layer in layers for parameter in lora[layer]]
        count = len(parameters)
        masters = [state.shard(parameter, "master") for parameter in parameters]
        gradients = [model.unscaled_gradient(parameter) for parameter in parameters]
        gathered = gather(masters + gradients, parameters * 2)
        weights = iter(gathered[:count])
        grads = iter(gathered[count:])
        for layer in layers:
            yield model._named_factors(layer, weights, grads)
