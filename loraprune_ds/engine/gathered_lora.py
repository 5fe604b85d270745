"""The full LoRA factors of a model whose ranks hold parts of them."""

import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from loraprune_ds.pruning.prunable_model import LoraFactors, PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import GATHERED_NUMEL, gather_rounds, without_padding

# (part of this rank, shape of the full tensor) -> the part, flat, padded and on the device
Pad = Callable[[Tensor, Sequence[int]], Tensor]


@torch.no_grad()
def gather_factors(
    model: PrunableModel, comm: Communicator, pad: Pad
) -> Iterator[dict[str, LoraFactors]]:
    """Gathers masters and averaged gradients of A and B on every rank, several layers at once.

    fp16 gradients are unscaled here.

    Args:
        comm: the ranks that hold the model together.
    """
    state = model.optimizer_state
    lora = [list(layer.values()) for layer in model.lora_parameters()]
    sizes: list[int] = []
    for layer in lora:
        numel = sum(math.prod(state.full_shape(parameter)) for parameter in layer)
        sizes.append(2 * numel)  # with the gradients
    for layers in gather_rounds(sizes, GATHERED_NUMEL):
        parameters = [parameter for layer in layers for parameter in lora[layer]]
        shapes = [state.full_shape(parameter) for parameter in parameters] * 2
        masters = [state.shard(parameter, "master") for parameter in parameters]
        parts = masters + model.unscaled([model.gradient(parameter) for parameter in parameters])
        gathered = _gather(list(map(pad, parts, shapes)), comm)
        full = list(map(without_padding, gathered, shapes))
        weights = iter(full[: len(parameters)])
        grads = iter(full[len(parameters) :])
        for layer in layers:
            yield model._named_factors(layer, weights, grads)


def _gather(parts: list[Tensor], comm: Communicator) -> list[Tensor]:
    """Gathers the flat parts of several tensors by one all-gather. Returns (world_size, part) of each.

    Parts of one size travel side by side, so one copy brings together the parts of each of their tensors.
    """
    by_size: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        by_size.setdefault(len(part), []).append(i)
    order = [i for places in by_size.values() for i in places]
    gathered = comm.all_gather(torch.cat([parts[i] for i in order]))
    tensors: list[Tensor] = []
    start = 0
    for size, places in by_size.items():
        of_size = gathered.narrow(1, start, size * len(places))
        start += size * len(places)
        tensors += of_size.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
    return [tensor for _, tensor in sorted(zip(order, tensors, strict=True), key=itemgetter(0))]
