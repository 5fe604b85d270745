"""Counts the arithmetic of LoRA training from sizes alone. A multiply-add is two operations."""

from loraprune_ds.model.shapes import ModelShape


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one product of attention in all layers, over all of the window."""
    return 2 * sum(map(shape.query_heads, shape.layers)) * shape.head_dim * window


def needed_flops_per_token(shape: ModelShape, window: float) -> float:
    """Returns the operations that training needs per token. The utilisation of a GPU (MFU) is counted in these.

    A frozen weight takes two passes: the output and the gradient of the input. Attention takes six products, over half
    a window on average (PaLM, arXiv 2204.02311, appendix B). Scoring does not count, nor what is computed twice.
    LoRA's own products are below 1 % and do not count either.

    Args:
        window: the tokens that attention covers. Of unequal texts it is the mean over all tokens.
    """
    frozen = shape.active_numel() + shape.vocab_size * shape.hidden_size  # the head is one more linear
    return 4 * frozen + 6 * attention_product(shape, window) / 2
