"""The model that cuts have left of one on disk: its weights are slices, read from there and not stored again."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.pretrained import PretrainedModel, Slice
from loraprune_ds.model.shapes import LINEARS, LayerShape, group_indices, shape_from_config

Kept = Sequence[tuple[list[int], list[int]]]  # per layer: heads and channels of the model on disk, ascending


def cut_to(pretrained: PretrainedModel, kept: Kept, dtype: str) -> PretrainedModel:
    """The model that keeps these groups, as if it had been written and opened: described as an export of it would be.

    Args:
        dtype: of the weights, as config.json would name it.
    """
    layers = tuple(LayerShape(len(heads), len(channels)) for heads, channels in kept)
    if layers == pretrained.shape.layers:
        return pretrained
    config = export_config(pretrained.config, pretrained.shape.with_layers(layers), dtype).config
    shape = shape_from_config(config, str(pretrained.folder))
    return replace(pretrained, config=config, shape=shape, slices=_slices(pretrained, kept))


def _slices(pretrained: PretrainedModel, kept: Kept) -> dict[str, Slice]:
    slices = {}
    for i, (heads, channels) in enumerate(kept):
        for linear in LINEARS:
            groups = torch.tensor(heads if linear.kind == "heads" else channels)
            if len(groups) == pretrained.shape.layers[i].count(linear.kind):
                continue
            keep = group_indices(groups, pretrained.shape.group_width(linear))
            name = f"model.layers.{i}.{linear.name}"
            slices[f"{name}.weight"] = Slice(linear.axis, keep)
            if linear.axis == 0 and pretrained.shape.has_bias(linear):
                slices[f"{name}.bias"] = Slice(0, keep)
    return slices
