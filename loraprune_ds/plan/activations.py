"""What autograd keeps between forward and backward, and what is there besides: bytes of one micro-batch on one rank.

T tokens of B windows of w, h hidden_size, a query width, k key or value width, f channels, r LoRA rank, e bytes of an
element. A decoder layer under LoRA with frozen weights keeps

    norms        2 (4·T·h + 4·T + e·T·h)     its input in fp32, the reciprocal root, what the linears read
    attention    e·T·(2·a + 2·k) + 4·T·H     rotated queries and keys, values, output; fp32 log-sum-exp of H heads
    eager        e·T·4·a + B·H·w²·(4 + e)    instead if attn_implementation is eager: keys and values for
                                             every query head, probabilities in fp32 and, if e < 4, in e bytes
    mlp          4·e·T·f                     gate, its SiLU, up, their product
    lora         7·e·T·r                     what B reads
    dropout      T·(e + m)·(5·h + a + f)     if lora_dropout > 0: mask of m bytes and dropped input of each linear

(counted on the graph: tests/benchmarks/plan_measured.py). With activation checkpointing a layer keeps its input, e·T·h,
and one layer at a time is there in full, while its backward runs.
"""

from dataclasses import dataclass

from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.shapes import LayerShape, ModelShape

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

    @property
    def copy_size(self) -> int:
        """Bytes of an element beside its fp32 original; none if that is the model's dtype."""
        return self.element_size if self.element_size < 4 else 0

    def probabilities(self, shape: ModelShape, layer: LayerShape) -> int:
        """Elements of one layer's attention probabilities, which only `attn_implementation: eager` makes."""
        return self.samples * layer.heads * shape.queries_per_group * self.window**2


def saved_by_layer(
    shape: ModelShape,
    layer: LayerShape,
    batch: Batch,
    *,
    lora_rank: int,
    dropout: bool,
    mask_size: int = DROPOUT_MASK,
    eager: bool = False,
) -> int:
    """Bytes that one decoder layer keeps without checkpointing."""
    t, e, h, f = batch.tokens, batch.element_size, shape.hidden_size, layer.channels
    key_width = layer.heads * shape.head_dim
    query_heads = layer.heads * shape.queries_per_group
    query_width = query_heads * shape.head_dim
    norms = 2 * (4 * t * h + 4 * t + e * t * h)
    attention = e * t * (2 * query_width + 2 * key_width) + 4 * t * query_heads
    if eager:
        attention = e * t * 4 * query_width + batch.probabilities(shape, layer) * (4 + batch.copy_size)
    mlp = 4 * e * t * f
    lora = len(shape.linears) * e * t * lora_rank
    dropped = t * (e + mask_size) * (5 * h + query_width + f) if dropout else 0
    return norms + attention + mlp + lora + dropped


def backward_temporaries(shape: ModelShape, layer: LayerShape, batch: Batch, *, eager: bool = False) -> int:
    """Gradients alive at once in a layer's backward: of the residual and of the widest place.

    In the MLP that is the product's gradient from the weight and from LoRA, and those of its two factors; in a norm,
    three fp32 tensors of the hidden size; in eager attention the fp32 gradients of the probabilities and of what
    softmax made them of.
    """
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    probabilities = 8 * batch.probabilities(shape, layer) if eager else 0
    return 2 * e * t * h + max(4 * e * t * layer.channels, 12 * t * h, probabilities)


def causal_mask(batch: Batch) -> int:
    """What eager attention adds to its scores."""
    return batch.element_size * batch.samples * batch.window**2


def forward_temporaries(shape: ModelShape, layer: LayerShape, batch: Batch, *, eager: bool) -> int:
    """The widest place of a forward pass that keeps nothing: the MLP, or in eager attention masked scores,
    probabilities in fp32, and in the model's dtype.
    """
    e = batch.element_size
    probabilities = (e + 4 + batch.copy_size) * batch.probabilities(shape, layer) if eager else 0
    return max(4 * e * batch.tokens * layer.channels, probabilities) + (causal_mask(batch) if eager else 0)


def activations(
    shape: ModelShape, batch: Batch, *, lora_rank: int, dropout: bool, checkpointing: bool, eager: bool = False
) -> int:
    """Most bytes of activations at once during a micro-batch, logits apart."""
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    layers = [saved_by_layer(shape, x, batch, lora_rank=lora_rank, dropout=dropout, eager=eager) for x in shape.layers]
    temporaries = max(backward_temporaries(shape, layer, batch, eager=eager) for layer in shape.layers)
    shared = 2 * e * batch.window * shape.head_dim + (causal_mask(batch) if eager else 0)  # rotary angles and mask
    last_norm = 4 * t * h + 4 * t + e * t * h
    if checkpointing:
        return len(layers) * e * t * h + max(layers) + temporaries + shared + last_norm
    return sum(layers) + temporaries + shared + last_norm


def logits(shape: ModelShape, batch: Batch, chunk_tokens: int | None) -> int:
    """Bytes of a chunk's logits: fp32, and a copy in the model's dtype while one is made of the other.

    Plus, for all tokens, the hidden states that reach the head and their gradient.
    """
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, chunk_tokens, buffers=1))
    return chunk * shape.vocab_size * (4 + batch.copy_size) + 2 * batch.tokens * shape.hidden_size * batch.element_size
