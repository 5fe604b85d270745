"""Counts the operations of LoRA training (two per multiply-add), from sizes alone."""

import math

from loraprune_ds.model.shapes import ModelShape

WHOLE_QUERIES, WHOLE_KEYS = "self_attn.q_proj", "self_attn.k_proj"  # in families whose heads stay


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token uses: all, but only its chosen experts."""
    idle = sum(max(0, layer.get("experts", 0) - shape.experts_per_token) for layer in shape.layers)
    every = sum(math.prod(shape.linear_shape(i, linear)) for i, linear in shape.linear_ids())
    others = (size for i in range(len(shape.layers)) for size in shape.others(i).values())
    every += sum(math.prod(size) for size in others if len(size) > 1)  # whole linears without LoRA
    return every - idle * shape.group_numel("experts")


def cached_numel(shape: ModelShape) -> int:
    """Counts the elements a token adds to the KV cache in all layers. Latent attention caches one key for all heads.

    With an encoder it counts one token of the encoder and one of the decoder.
    """
    if latent := shape.widths.get("key_value_rank"):
        return len(shape.layers) * (latent + shape.head_dim)
    whole = sum(layer[WHOLE_KEYS][0] for layer in shape.whole.values() if WHOLE_KEYS in layer)
    heads = (layer.get(kind, 0) for layer in shape.layers[shape.encoder_layers :] for kind in ("heads", "cross_heads"))
    return 2 * (sum(heads) * shape.head_dim + whole)


def state_numel(shape: ModelShape) -> int:
    """Counts the elements of the states of all delta nets, which have no KV cache. They are fp32, for any window."""
    of_a_key_head = shape.widths.get("delta_key", 0) * shape.widths.get("delta_values", 0)
    return sum(layer.get("delta", 0) for layer in shape.layers) * of_a_key_head


def attention_product(shape: ModelShape, window: float) -> float:
    """Returns the operations per token of one attention product in all layers, over the full window.

    With latent attention the products of scores and values differ, and this is their mean. A delta net multiplies its
    state three times: by the key, by the query, and to add the value. That equals two products over half a window here.
    """
    width = sum(shape.widths.get(of, shape.head_dim) for of in ("query", "value")) / 2
    queries = (
        (shape.query_heads(layer) + layer.get("cross_heads", 0)) * width for layer in shape.layers if "heads" in layer
    )
    whole = (layer[WHOLE_QUERIES][0] for layer in shape.whole.values() if WHOLE_QUERIES in layer)
    return 2 * (sum(queries) + sum(whole)) * window + 6 * state_numel(shape)


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
