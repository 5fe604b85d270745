"""Counts the arithmetic of LoRA training from sizes alone. A multiply-add is two operations."""

import math

from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.shapes import ModelShape


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token meets: its chosen experts, and all matrices that are never cut."""
    idle = sum(max(0, layer.get("experts", 0) - shape.experts_per_token) for layer in shape.layers)
    others = (size for i in range(len(shape.layers)) for size in shape.others(i).values())
    never_cut = sum(math.prod(size) for size in others if len(size) > 1)
    return shape.linear_numel() + never_cut - idle * shape.group_numel("experts")


def met_numel(shape: ModelShape) -> int:
    """Counts the parameters with LoRA that one token meets."""
    return sum(_met(shape, i, linear, shape.linear_shape(i, linear)) for i, linear in shape.linear_ids())


def active_lora(shape: ModelShape, lora_rank: int) -> int:
    """Counts the elements of LoRA that one token meets."""
    factors = (
        (i, linear, size) for i, linear in shape.linear_ids() for size in shape.lora_shapes(i, linear, lora_rank)
    )
    return sum(_met(shape, *factor) for factor in factors)


def _met(shape: ModelShape, layer: int, linear: Linear, size: tuple[int, int]) -> int:
    """Counts the elements of a tensor that one token meets. A stack has equal parts for all experts."""
    numel = math.prod(size)
    return numel // shape.layers[layer]["experts"] * shape.experts_per_token if linear.is_stack else numel


def mlp_width(shape: ModelShape, layer: int) -> int:
    """Counts the channels in the MLP of a layer that one token meets at the same time."""
    counts, matrices = shape.layers[layer], (size for size in shape.others(layer).values() if len(size) > 1)
    chosen = shape.experts_per_token * shape.expert_size if counts.get("experts") else 0
    never_cut = (rows if columns == shape.hidden_size else columns for rows, columns in matrices)
    return max(counts.get("channels", 0), chosen, *never_cut)


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers. Latent attention caches one key for all heads."""
    if latent := shape.widths.get("key_value_rank"):
        return len(shape.layers) * (latent + shape.head_dim)
    return 2 * sum(layer["heads"] for layer in shape.layers) * shape.head_dim


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one product of attention in all layers, over all of the window.

    With latent attention scores and sums differ, and this is their mean.
    """
    width = sum(shape.widths.get(of, shape.head_dim) for of in ("query", "value")) / 2
    return 2 * sum(map(shape.query_heads, shape.layers)) * width * window


def needed_flops_per_token(shape: ModelShape, window: float) -> float:
    """Returns the operations that training needs per token. The utilisation of a GPU (MFU) is counted in these.

    A frozen weight takes two passes: the output and the gradient of the input. Attention takes six products, over half
    a window on average (PaLM, arXiv 2204.02311, appendix B). Scoring and recomputation do not count. LoRA's own
    products are below 1 % and do not count either.

    Args:
        window: the tokens that attention covers. The mean over all tokens if texts differ.
    """
    frozen = active_numel(shape) + shape.vocab_size * shape.hidden_size  # the head is one more linear
    return 4 * frozen + 6 * attention_product(shape, window) / 2
