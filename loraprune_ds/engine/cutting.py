"""Makes the parameters of decoder layers smaller, and cuts those that this process holds whole."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.errors import fail_point
from loraprune_ds.model.adapters import base_parameter, lora_linear, lora_weights, set_sizes
from loraprune_ds.model.frozen import Slice, storage_format, stored_tensors
from loraprune_ds.model.groups import LayerKeep, LayerSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.ranks.flat import kept_within

ParameterCut = tuple[nn.Parameter, Slice]


def cut_layers(
    layers: Iterable[nn.Module],
    shape: ModelShape,
    keep: Iterable[LayerKeep],
    cut: Callable[[Iterable[ParameterCut]], None],
) -> None:
    """Cuts one decoder layer after another. `shape` is from before the cut.

    Args:
        cut: makes the parameters of a layer smaller.
    """
    for layer, spec, layer_keep in zip(layers, shape.layers, keep, strict=True):
        cut(parameter_cuts(layer, spec, layer_keep))
        set_sizes(layer, spec.resized(layer_keep.counts))
        kept_within.cache_clear()
        fail_point("cut.layer")


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape, also while the graph of an old loss is alive.

    Autograd keeps the node that takes a parameter's gradients as long as a graph has it, with the shape it began with.
    """
    # A change of the dtype makes torch forget the node. A change of the shape does not.
    other = torch.float32 if data.dtype == torch.bfloat16 else torch.bfloat16
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data


def cut_whole(cuts: Iterable[ParameterCut]) -> None:
    """Makes parameters smaller that this process holds whole, and drops their gradients."""
    for parameter, kept in cuts:
        parameter.grad = None
        replace_data(parameter, select(parameter.data, kept))


def select(tensor: Tensor, kept: Slice) -> Tensor:
    """Copies what is kept of a whole tensor."""
    indices = kept_within(kept.keep, 0, tensor.shape[kept.axis], tensor.device)
    return tensor.index_select(kept.axis, indices)


def parameter_cuts(layer: nn.Module, spec: LayerSpec, keep: LayerKeep) -> Iterator[ParameterCut]:
    """Yields the parameters of a layer that get smaller. `spec` is from before the cut."""
    for tensor, kept in spec.cuts(keep):
        if not tensor.lora:
            yield base_parameter(layer, tensor.name), kept
            continue
        module: Any = lora_linear(layer, tensor.linear)
        base = module.base_layer
        stored_kept = storage_format(base).kept(kept)
        for stored in stored_tensors(base):
            yield stored, stored_kept
        # the reference model of DPO or GRPO may be a second adapter
        for adapter in module.lora_A:
            factors = lora_weights(module, adapter)
            for index, factor_kept in tensor.lora_cuts(module.r[adapter], kept.keep, keep):
                yield factors[index], factor_kept
