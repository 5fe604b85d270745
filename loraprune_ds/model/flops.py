"""Counts the operations of LoRA training (two per multiply-add), from sizes alone."""

from loraprune_ds.model.shape import ModelShape


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token uses: all, but only its chosen experts."""
    chosen = shape.mixture.experts_per_token if shape.mixture else 0
    idle = sum(max(0, counts.get("experts", 0) - chosen) for counts in shape.counts)
    tensors = (tensor for layer in shape.layers for tensor in layer.tensors)
    linears = (x for x in tensors if x.lora or (len(x.shape) > 1 and not x.runs))  # some have no LoRA
    return sum(linear.numel for linear in linears) - (idle * shape.group_numel("experts") if idle else 0)


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers.

    With an encoder it counts one token of the encoder and one of the decoder.
    """
    return sum(attention.cached for attention in shape.attention)


def state_numel(shape: ModelShape) -> int:
    """Counts the elements of the states of all delta nets, which have no KV cache. They are fp32, for any window."""
    return sum(attention.state for attention in shape.attention)


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one attention product in all layers, over the full window.

    A delta net multiplies its state three times: by the key, by the query, and to add the value. That equals two
    products over half a window here.
    """
    return 2 * sum(attention.width for attention in shape.attention) * window + 6 * state_numel(shape)


def needed_flops_per_token(shape: ModelShape, window: float) -> float:
    """Returns the operations that training needs per token. The utilisation of a GPU (MFU) counts these.

    A frozen weight takes two passes: the output and the gradient of the input. Attention takes six products, over half
    a window on average (PaLM, arXiv 2204.02311, appendix B). Scoring and recomputation do not count, nor do
    LoRA's own products, which are below 1 %.

    Args:
        window: the tokens that attention covers. The mean over all tokens if texts differ.
    """
    frozen = active_numel(shape) + shape.vocab_size * shape.hidden_size  # the head is one more linear
    return (4 * frozen + 6 * attention_product(shape, window) / 2) / len(shape.layer_lists)  # a token is in one
