"""Compares a cut model with the masked one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.shape import ModelShape
from tests.support import family_cuts
from tests.support.families import norms_are_wide
from tests.support.family_cuts import Network, difference, draw

TOLERANCE = 1e-5
MATTERS = 0.1  # a smaller difference would not show that a group is gone


def mask(network: Network, keep: list[LayerKeep]) -> None:
    """Zeroes what the other groups send into the linears that end attention and MLP. No token chooses other experts."""
    for i, layer in enumerate(decoder_layers(network.model)):
        for _, linear in network.shape.input_linears([i]):
            module: Any = layer.get_submodule(linear.linear)
            if linear.stack:
                mask_router(family_cuts.find_router(layer), keep[i]["experts"])
                continue
            factors = stays(network.shape, i, keep[i], linear.spans[0].kind, module.in_features)
            module.register_forward_pre_hook(times_input(factors))


def mask_router(gate: Any, kept: Tensor) -> None:
    """Computes routers once more, as their papers have them: softmax or corrected sigmoid, the largest add up to 1.

    Gemma 4 and Hunyuan have a linear, and the rest comes after it.
    """
    others = torch.ones(len(gate.weight), dtype=torch.bool).index_fill(0, kept, False)
    if isinstance(gate, nn.Linear):
        gate.register_forward_hook(
            lambda module, inputs, logits: logits.masked_fill(others, -torch.inf)
        )
        return

    def route(hidden: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.flatten(0, -2) @ gate.weight.T + getattr(gate, "bias", 0)
        if (added := getattr(gate, CORRECTION, correction)) is not None:
            scores = logits.sigmoid()
            chosen = (scores + added).masked_fill(others, -torch.inf).topk(gate.top_k).indices
        else:
            scores = logits.masked_fill(others, -torch.inf).softmax(1)
            # Ernie 4.5 has one, too
            added = getattr(getattr(gate, "moe_statics", None), CORRECTION, torch.zeros(1))
            chosen = (scores + added).masked_fill(others, -torch.inf).topk(gate.top_k).indices
        weights = scores.gather(1, chosen)
        # DeepSeek-V2's weights stay as they are
        if getattr(gate, "norm_topk_prob", not hasattr(gate, "topk_method")):
            weights = weights / weights.sum(1, keepdim=True)
        return logits, weights * getattr(gate, "routed_scaling_factor", 1.0), chosen

    gate.forward = route


def stays(shape: ModelShape, layer: int, keep: LayerKeep, kind: Kind, size: int) -> Tensor:
    """Returns (size,) with 1 where a kept group is, 0 elsewhere."""
    groups = torch.zeros(shape.counts[layer][kind])
    groups[keep[kind]] = 1
    assert size % len(groups) == 0
    return groups.repeat_interleave(size // len(groups))


def times_input(factors: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, inputs: (inputs[0] * factors,)


def mask_before_wide_norms(network: Network, keep: list[LayerKeep]) -> None:
    """Zeroes queries and keys, too, and makes up for a mean over all heads instead of the kept ones."""
    for i, layer in enumerate(decoder_layers(network.model)):
        for name in ("q", "k"):
            linear: Any = layer.get_submodule(f"self_attn.{name}_proj")
            norm: Any = layer.get_submodule(f"self_attn.{name}_norm")
            factors = stays(network.shape, i, keep[i], "heads", linear.out_features)
            linear.register_forward_hook(
                lambda module, inputs, output, factors=factors: output * factors
            )
            norm.weight.data *= factors.mean().sqrt()


def assert_masked_equals_cut(
    family: str, network: Network, masked: Network, counts: list[tuple[int, int]]
) -> None:
    """Cuts one of two equal models and masks the other. In fp32 some CPUs round beyond the tolerance, so it is fp64."""
    network.model.double()
    masked.model.double()
    keep, before = draw(network.shape, *counts), network.logits()
    mask(masked, keep)
    if norms_are_wide(family):
        mask_before_wide_norms(masked, keep)
    network.cut(keep)
    assert difference(network.logits(), masked.logits()) < TOLERANCE
    assert difference(network.logits(), before) > MATTERS
