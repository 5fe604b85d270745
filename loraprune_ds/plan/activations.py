"""What autograd keeps between forward and backward, and what is there besides: bytes of one micro-batch on one rank.

T tokens, h hidden_size, a query width, k key or value width, f channels, r LoRA rank, e bytes of an element. A decoder
layer under LoRA with frozen weights keeps

    norms        2 (4·T·h + 4·T + e·T·h)     its input in fp32, the reciprocal root, what the linears read
    attention    e·T·(2·a + 2·k) + 4·T·H     rotated queries and keys, values, output; fp32 log-sum-exp of H heads
    mlp          4·e·T·f                     gate, its SiLU, up, their product
    lora         7·e·T·r                     what B reads
    dropout      T·(e + m)·(5·h + a + f)     if lora_dropout > 0: mask of m bytes and dropped input of each linear

(counted on the graph: tests/benchmarks/plan_measured.py). With activation checkpointing a layer keeps its input, e·T·h,
and one layer at a time is there in full, while its backward runs.
"""

from dataclasses import dataclass

from loraprune_ds.model.shapes import LINEARS, LayerShape, ModelShape
from loraprune_ds.model.token_loss import LOGITS_AT_ONCE

DROPOUT_MASK = 1  # bytes of an element of torch's fused dropout mask, on a GPU


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `samples` windows of `window` tokens, in elements of `element_size` bytes."""

    samples: int
    window: int
    element_size: int

    @property
    def tokens(self) -> int:
        return self.samples * self.window


def saved_by_layer(
    shape: ModelShape, layer: LayerShape, batch: Batch, *, lora_rank: int, dropout: bool, mask_size: int = DROPOUT_MASK
) -> int:
    """Bytes that one decoder layer keeps without checkpointing."""
    t, e, h, f = batch.tokens, batch.element_size, shape.hidden_size, layer.channels
    key_width = layer.heads * shape.head_dim
    query_heads = layer.heads * shape.queries_per_group
    query_width = query_heads * shape.head_dim
    norms = 2 * (4 * t * h + 4 * t + e * t * h)
    attention = e * t * (2 * query_width + 2 * key_width) + 4 * t * query_heads
    mlp = 4 * e * t * f
    lora = len(LINEARS) * e * t * lora_rank
    dropped = t * (e + mask_size) * (5 * h + query_width + f) if dropout else 0
    return norms + attention + mlp + lora + dropped


def backward_temporaries(shape: ModelShape, layer: LayerShape, batch: Batch) -> int:
    """Gradients alive at once in a layer's backward: of the residual and of the widest place.

    In the MLP that is the product's gradient from the weight and from LoRA, and those of its two factors; in a norm,
    three fp32 tensors of the hidden size.
    """
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    return 2 * e * t * h + max(4 * e * t * layer.channels, 12 * t * h)


def activations(shape: ModelShape, batch: Batch, *, lora_rank: int, dropout: bool, checkpointing: bool) -> int:
    """Most bytes of activations at once during a micro-batch, logits apart."""
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    layers = [saved_by_layer(shape, x, batch, lora_rank=lora_rank, dropout=dropout) for x in shape.layers]
    temporaries = max(backward_temporaries(shape, layer, batch) for layer in shape.layers)
    rotary = 2 * e * batch.window * shape.head_dim
    last_norm = 4 * t * h + 4 * t + e * t * h
    if checkpointing:
        return len(layers) * e * t * h + max(layers) + temporaries + rotary + last_norm
    return sum(layers) + temporaries + rotary + last_norm


def logits(shape: ModelShape, batch: Batch, chunk_tokens: int | None) -> int:
    """Bytes of a chunk's logits: fp32, and a copy in the model's dtype while one is made of the other.

    Plus, for all tokens, the hidden states that reach the head and their gradient.
    """
    chunk = min(batch.tokens, chunk_tokens or max(1, LOGITS_AT_ONCE // shape.vocab_size))
    copy = batch.element_size if batch.element_size < 4 else 0
    return chunk * shape.vocab_size * (4 + copy) + 2 * batch.tokens * shape.hidden_size * batch.element_size
